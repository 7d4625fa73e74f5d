"""What is never run for a client, each with its reason, and what needs no worker.

The reasons are about safety or meaning. Only names of :mod:`wsfed.ops.names` are run: a name
that is neither there nor here is unknown, and the lists here serve the error's text and keep
``scripts/generate_ops.py`` from allowing one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["LOCAL", "REFUSED", "reason"]

#: Reason, then names without their ``torch.``.
_REASONS: Final[tuple[tuple[str, str], ...]] = (
    (
        "it reads or writes files of the worker, or runs what it finds in them",
        """
        load save from_file frombuffer from_numpy import_ir_module import_ir_module_from_buffer
        export.export export.load export.save hub.load hub.load_state_dict_from_url jit.load
        jit.save jit.script jit.trace library.Library ops.load_library package.PackageImporter
        serialization.load serialization.save classes.load_library
        """,
    ),
    (
        "it runs code that the client would have to send",
        """
        Tensor.__reduce_ex__ Tensor.__setstate__ Tensor._backward_hooks.__get__
        Tensor._post_accumulate_grad_hooks.__get__ Tensor.apply_ Tensor.as_subclass Tensor.map2_
        Tensor.map_ Tensor.module_load compile cond func.vmap vmap
        nn.functional.triplet_margin_with_distance_loss
        """,
    ),
    (
        "a worker runs no code of the client's; take gradients with torch.autograd.grad, or change "
        "p.grad after backward",
        "Tensor.register_hook Tensor.register_post_accumulate_grad_hook",
    ),
    (
        "it changes a setting of the whole process, which other sessions share",
        """
        manual_seed seed random.manual_seed random.seed random.set_rng_state set_anomaly_enabled
        set_autocast_cache_enabled set_autocast_dtype set_autocast_enabled set_default_device
        set_default_dtype set_default_tensor_type set_deterministic_debug_mode
        set_float32_matmul_precision set_flush_denormal set_grad_enabled set_num_interop_threads
        set_num_threads set_printoptions set_rng_state set_warn_always
        use_deterministic_algorithms
        """,
    ),
    (
        "it gives uninitialised or neighbouring memory, maybe another's; use zeros_like or slices",
        """
        Tensor.as_strided Tensor.as_strided_ Tensor.as_strided_scatter Tensor.new Tensor.new_empty
        Tensor.new_empty_strided Tensor.resize Tensor.resize_ Tensor.resize_as Tensor.resize_as_
        Tensor.resize_as_sparse_ Tensor.set_ as_strided as_strided_ as_strided_copy
        as_strided_scatter empty empty_like empty_permuted empty_quantized empty_strided resize_as_
        """,
    ),
    (
        "its kernel trusts sizes or offsets that a client chooses, and reads beyond its tensors",
        """
        native_batch_norm segment_reduce nn.functional.grouped_mm nn.functional.scaled_grouped_mm
        nn.functional.scaled_mm
        """,
    ),
    (
        "its kernel trusts the sizes it is given; make the optimizer with fused=False",
        "_fused_adagrad_ _fused_adam_ _fused_adamw_ _fused_sgd_",
    ),
    (
        "scaling of losses is not carried to workers; autocast to bfloat16 needs none",
        "_amp_foreach_non_finite_check_and_unscale_ _amp_update_scale_",
    ),
    (
        "it gives away an address of the worker's memory, or how it is kept",
        """
        Tensor.__cuda_array_interface__.__get__ Tensor.__dlpack__ Tensor.__dlpack_device__
        Tensor._cdata.__get__ Tensor.const_data_ptr Tensor.data_ptr Tensor.is_pinned
        Tensor.is_shared Tensor.pin_memory Tensor.record_stream Tensor.share_memory_
        Tensor.storage Tensor.storage_type Tensor.untyped_storage
        """,
    ),
    (
        "its result is a value of Python's; get the tensor, or compare on the worker",
        """
        Tensor.__array__ Tensor.__array_wrap__ Tensor.__bool__ Tensor.__complex__
        Tensor.__contains__ Tensor.__float__ Tensor.__index__ Tensor.__int__ Tensor.__long__
        Tensor.__nonzero__ Tensor.allclose Tensor.equal Tensor.is_nonzero Tensor.is_same_size
        Tensor.is_set_to Tensor.item Tensor.numpy Tensor.tolist allclose equal is_nonzero
        is_same_size
        """,
    ),
    (
        "the worker's owner chooses the device",
        """
        Tensor.cuda Tensor.get_device Tensor.ipu Tensor.mtia Tensor.to_mkldnn Tensor.xpu get_device
        """,
    ),
    (
        "quantised tensors have no wire form yet",
        """
        Tensor.dequantize Tensor.int_repr Tensor.q_per_channel_axis Tensor.q_per_channel_scales
        Tensor.q_per_channel_zero_points Tensor.q_scale Tensor.q_zero_point Tensor.qscheme
        choose_qparams_optimized dequantize fake_quantize_per_channel_affine
        fake_quantize_per_tensor_affine fbgemm_linear_fp16_weight
        fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight
        fbgemm_linear_int8_weight_fp32_activation fbgemm_linear_quantize_weight
        fbgemm_pack_gemm_matrix_fp16 fbgemm_pack_quantized_matrix fused_moving_avg_obs_fake_quant
        int_repr q_per_channel_axis q_per_channel_scales q_per_channel_zero_points q_scale
        q_zero_point quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic
        quantized_batch_norm quantized_gru_cell quantized_lstm_cell quantized_max_pool1d
        quantized_max_pool2d quantized_max_pool3d quantized_rnn_relu_cell quantized_rnn_tanh_cell
        """,
    ),
    (
        "sparse and nested tensors have no wire form yet",
        """
        Tensor._clear_non_serializable_cached_data Tensor._coalesced_ Tensor._dimI Tensor._dimV
        Tensor._indices Tensor._nested_tensor_size Tensor._nested_tensor_storage_offsets
        Tensor._nested_tensor_strides Tensor._nnz Tensor._sparse_mask_projection Tensor._to_dense
        Tensor._values Tensor.ccol_indices Tensor.coalesce Tensor.col_indices Tensor.crow_indices
        Tensor.dense_dim Tensor.indices Tensor.is_coalesced
        Tensor.row_indices Tensor.slice_inverse Tensor.smm Tensor.sparse_dim Tensor.sparse_mask
        Tensor.sparse_resize_ Tensor.sparse_resize_and_clear_ Tensor.sspaddmm Tensor.to_dense
        Tensor.to_padded_tensor Tensor.to_sparse Tensor.to_sparse_bsc Tensor.to_sparse_bsr
        Tensor.to_sparse_coo Tensor.to_sparse_csc Tensor.to_sparse_csr Tensor.values
        ccol_indices_copy col_indices_copy crow_indices_copy hspmm indices_copy
        row_indices_copy slice_inverse smm spmm sspaddmm values_copy
        """,
    ),
    (
        "it is internal to torch",
        """
        Tensor._autocast_to_full_precision Tensor._autocast_to_reduced_precision
        Tensor._base.__get__ Tensor._grad.__get__ Tensor._grad_fn.__get__
        Tensor._version.__get__ Tensor.grad_dtype.__get__ Tensor.name.__get__
        Tensor.retains_grad.__get__ Tensor.volatile.__get__ autocast
        nn.functional._sym_int sym_float sym_ite sym_max sym_min sym_not sym_sqrt sym_sum
        """,
    ),
    (
        "torch.compile cannot trace a tensor that is elsewhere; call the module as it is",
        "Tensor._is_view",
    ),
    (
        "it exists for one vendor's library; use the public operation",
        """
        batch_norm_backward_elemt batch_norm_backward_reduce batch_norm_elemt
        batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_stats
        batch_norm_update_stats cudnn_batch_norm cudnn_convolution mkldnn_convolution
        mkldnn_rnn_layer miopen_batch_norm miopen_convolution miopen_convolution_add_relu
        miopen_convolution_relu miopen_convolution_transpose miopen_depthwise_convolution
        miopen_rnn
        """,
    ),
)

_LISTS: Final = (
    "it writes into a list of tensors, where labels of private data could not follow; "
    "make the optimizer with foreach=False"
)

#: Name → reason.
REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {f"torch.{name}": why for why, names in _REASONS for name in names.split()}
)

#: Answered on the client: what a pointer knows about itself.
_METADATA: Final = """
    Tensor.__deepcopy__ Tensor.__format__ Tensor.__hash__ Tensor.__len__ Tensor.__repr__
    Tensor.__reversed__ Tensor.backward Tensor.device.__get__ Tensor.dim Tensor.dim_order
    Tensor.dtype.__get__ Tensor.element_size Tensor.grad_fn.__get__ Tensor.is_complex
    Tensor.is_conj Tensor.is_contiguous Tensor.is_cpu.__get__ Tensor.is_cuda.__get__
    Tensor.is_distributed Tensor.is_floating_point Tensor.is_inference Tensor.is_ipu.__get__
    Tensor.is_leaf.__get__ Tensor.is_maia.__get__ Tensor.is_meta.__get__ Tensor.is_mkldnn.__get__
    Tensor.is_mps.__get__ Tensor.is_mtia.__get__ Tensor.is_neg Tensor.is_nested.__get__
    Tensor.is_quantized.__get__ Tensor.is_signed Tensor.is_sparse.__get__
    Tensor.is_sparse_csr.__get__ Tensor.is_vulkan.__get__ Tensor.is_xla.__get__
    Tensor.is_xpu.__get__ Tensor.itemsize.__get__ Tensor.layout.__get__ Tensor.nbytes.__get__
    Tensor.ndim.__get__ Tensor.ndimension Tensor.nelement Tensor.numel Tensor.output_nr.__get__
    Tensor.requires_grad.__get__ Tensor.shape.__get__ Tensor.size Tensor.storage_offset
    Tensor.stride is_complex is_conj is_distributed is_floating_point is_inference is_neg
    is_signed numel
"""
LOCAL: Final = frozenset(f"torch.{name}" for name in _METADATA.split())


def reason(name: str) -> str | None:
    """Why an operation is never run for a client; ``None`` where nothing speaks against it."""
    if name.startswith("torch._foreach_") and name.endswith("_"):
        return _LISTS
    return REFUSED.get(name)
