"""What is never run for a client, each with its reason, and what needs no worker.

The reasons are about safety or meaning. A name that is neither here nor in the table is unknown.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["LOCAL", "SPACES", "reason"]

#: Where names are looked for; nothing else can be reached.
SPACES: Final = (
    "torch.nn.functional",
    "torch.Tensor",
    "torch.linalg",
    "torch.fft",
    "torch.special",
    "torch.functional",
    "torch",
)

_MEMORY = (
    "it gives uninitialised or neighbouring memory, which may hold another's data; "
    "use zeros_like, or slices"
)
_HOST = "it gives away an address of the worker's memory"
_CODE = "it runs code that the client would have to send"
_FILES = "it reads or writes files of the worker"
_VALUE = "its result is a value of Python's; get the tensor, or compare on the worker"
_DEVICE = "the worker's owner chooses the device"
_QUANTISED = "quantised tensors have no wire form yet"
_SPARSE = "sparse and nested tensors have no wire form yet"
_INTERNAL = "it is not public in torch"
_VENDOR = "it exists for one vendor's library; use the public operation"

_RULES: Final[tuple[tuple[str, str], ...]] = (
    (r"empty_like|(?:new_)?empty(?:_strided)?|resize\w*|set_|as_strided\w*|new_empty\w*", _MEMORY),
    (r"(?:const_)?data_ptr|untyped_storage|storage|storage_type|__cuda_array_interface__\..*"
     r"|__dlpack\w*|_cdata\..*|share_memory_|is_shared|pin_memory|is_pinned|record_stream", _HOST),
    (r"apply_|map_|map2_|register_hook|register_post_accumulate_grad_hook|_backward_hooks\..*"
     r"|_post_accumulate_grad_hooks\..*|module_load|triplet_margin_with_distance_loss"
     r"|__reduce_ex__|__setstate__", _CODE),
    (r"load|save|from_file|compile|jit|hub|package|library|ops", _FILES),
    (r"item|tolist|numpy|equal|allclose|is_nonzero|__bool__|__float__|__int__|__index__|__long__"
     r"|__complex__|__nonzero__|__contains__|__array__|__array_wrap__|is_same_size|is_set_to", _VALUE),
    (r"cuda|xpu|ipu|mtia|to_mkldnn|get_device", _DEVICE),
    (r"quantize\w*|dequantize|q_\w+|int_repr|qscheme|quantized_\w+|fake_quantize\w*|fbgemm\w*"
     r"|choose_qparams\w*|fused_moving_avg\w*", _QUANTISED),
    (r"\w*sparse\w*|coalesce|is_coalesced|(?:c?col|c?row|c?crow)_indices\w*|indices\w*|values\w*"
     r"|smm|sspaddmm|hspmm|spmm|dense_dim|_nnz|_dim[IV]|_indices|_values|_coalesced_|to_dense"
     r"|_to_dense|_nested\w*|_clear_non\w*|_sparse\w*|nonzero_static|slice_inverse", _SPARSE),
    (r"_autocast\w*|_grad\..*|_grad_fn\..*|_base\..*|_is_view|_version\..*|_sym_int|sym_\w+|autocast"
     r"|volatile\..*|name\..*|as_subclass|hash_tensor|retains_grad\..*|grad_dtype\..*", _INTERNAL),
    (r"miopen\w*|cudnn\w*|batch_norm_(?:backward|elemt|gather|stats|update)\w*|mkldnn\w*", _VENDOR),
)
_COMPILED: Final = tuple((re.compile(pattern), why) for pattern, why in _RULES)

#: Answered on the client: what a pointer knows about itself.
_METADATA: Final = """
    dim size stride numel nelement ndimension element_size storage_offset is_floating_point
    is_complex is_conj is_neg is_contiguous is_signed is_inference is_distributed dim_order
    __len__ __repr__ __format__ __deepcopy__ __hash__ backward dtype.__get__ device.__get__
    shape.__get__ layout.__get__ ndim.__get__ nbytes.__get__ itemsize.__get__ is_leaf.__get__
    grad_fn.__get__ requires_grad.__get__ output_nr.__get__ is_cpu.__get__ is_cuda.__get__
    is_ipu.__get__ is_maia.__get__ is_meta.__get__ is_mkldnn.__get__ is_mps.__get__
    is_mtia.__get__ is_nested.__get__ is_quantized.__get__ is_sparse.__get__
    is_sparse_csr.__get__ is_vulkan.__get__ is_xla.__get__ is_xpu.__get__ __reversed__
""".split()
LOCAL: Final = frozenset(
    f"{space}.{word}" for space in ("torch", "torch.Tensor") for word in _METADATA
)


def reason(name: str) -> str | None:
    """Why an operation is never run for a client; ``None`` where nothing speaks against it."""
    space = next((space for space in SPACES if name.startswith(space + ".")), None)
    if space is None:
        return None
    word = name.removeprefix(space + ".")
    for pattern, why in _COMPILED:
        if pattern.fullmatch(word):
            return why
    return None
