"""Writes src/wsfed/ops/names.py: what a worker may be asked to run.

    python scripts/generate_ops.py            write it
    python scripts/generate_ops.py --check    fail if it would change

The names are those of ``torch.overrides`` (what a Tensor subclass can intercept) and the ones
below that it leaves out, less what ``wsfed.ops.refused`` gives a reason against and what is
answered on the client. Two properties are read off torch's own operator schemas, as far as these
tell, and completed by lists: whether results hold rows of an argument, and whether the operation
draws random numbers.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch.overrides import get_overridable_functions, resolve_name

from wsfed.ops import refused

TARGET: Final = Path(__file__).resolve().parent.parent / "src" / "wsfed" / "ops" / "names.py"

#: Where names are looked for; nothing else can be reached. Longer ones come first.
SPACES: Final = (
    "torch.nn.functional",
    "torch.Tensor",
    "torch.linalg",
    "torch.fft",
    "torch.special",
    "torch.functional",
    "torch.autograd",
    "torch._C._nn",
    "torch",
)

#: Intercepted, although ``torch.overrides`` does not list them; without their ``torch.``. (The
#: functions of torch.nn.init are intercepted too: the client takes them apart, since they give
#: the tensor that they change as a keyword.)
ALSO: Final = frozenset(
    """
    Tensor.data.__set__ Tensor.grad.__set__ Tensor.imag.__set__ Tensor.new_full Tensor.new_ones
    Tensor.new_tensor Tensor.new_zeros Tensor.real.__set__ Tensor.requires_grad.__set__
    Tensor.unflatten _C._nn.pad_sequence _is_all_true _is_any_true
    _pack_padded_sequence _pad_packed_sequence _weight_norm
    autograd.grad fill mm nn.functional.hardsigmoid nn.functional.hardswish
    nn.functional.sigmoid nn.functional.tanh nn.functional.upsample
    nn.functional.upsample_bilinear nn.functional.upsample_nearest normal rand_like randint_like
    randn_like vander zero_
    """.split()  # noqa: SIM905
) | frozenset(name for name in dir(torch) if name.startswith("_foreach_"))

#: Results hold rows, and the schema does not show it. Names as :func:`base` gives them.
ROWS: Final = frozenset(
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool1d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices
    adaptive_max_pool3d adaptive_max_pool3d_with_indices alpha_dropout amax amin aminmax argmax
    argmin argsort argwhere atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d
    batch_norm bernoulli multinomial poisson
    bfloat16 bincount block_diag bool broadcast_tensors bucketize byte cartesian_prod cat
    cdouble cfloat chalf channel_shuffle char chunk clone column_stack combinations complex
    concat concatenate constant_pad_nd contiguous copy cpu cross cummax cummin cumprod cumsum
    cumulative_trapezoid data detach diag diag_embed diagflat diagonal_scatter diff double
    dropout dropout1d dropout2d dropout3d dsplit dstack einsum embedding feature_alpha_dropout
    feature_dropout fft fft2 fftn fftshift fill fill_diagonal flip fliplr flipud float
    floor_divide fold frexp full_like gather ger getitem grad gradient grid_sample grid_sampler
    grid_sampler_2d grid_sampler_3d group_norm half hardswish hardtanh hfft hfft2 hfftn
    histc histogram histogramdd hsplit hstack ifft ifft2 ifftn ifftshift
    ihfft ihfft2 ihfftn index index_add index_copy index_fill index_put index_reduce
    index_select instance_norm int interpolate irfft irfft2 irfftn isclose isin isreal kron
    kthvalue layer_norm local_response_norm log_softmax logcumsumexp logsigmoid long lp_pool1d
    lp_pool2d lp_pool3d lu lu_factor lu_factor_ex lu_unpack masked_fill masked_scatter
    masked_select max max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices
    max_pool3d max_pool3d_with_indices max_unpool1d max_unpool2d max_unpool3d maximum median
    meshgrid min minimum mode moveaxis movedim msort nanmedian nanquantile narrow_copy
    native_channel_shuffle native_dropout native_group_norm native_layer_norm ndtr new_full
    new_tensor nonzero normalize one_hot outer pack_padded_sequence pad pad_packed_sequence
    pad_sequence pixel_shuffle pixel_unshuffle polar positive prelu put quantile ravel renorm
    repeat repeat_interleave reshape reshape_as rfft rfft2 rfftn rms_norm roll rot90 row_stack
    scatter scatter_add scatter_reduce searchsorted select_scatter setitem short slice_scatter
    softmax softmin softsign sort split stack take take_along_dim tanhshrink tensor_split tile
    to topk trapezoid trapz triangular_solve tril triu type type_as unflatten unfold unique
    unique_consecutive unsafe_chunk unsafe_split unsafe_split_with_sizes upsample
    upsample_bilinear upsample_nearest vander vsplit vstack where zero
    """.split()  # noqa: SIM905
)

#: Draws random numbers, and the schema does not show it.
RANDOM: Final = frozenset(
    """
    dropout1d dropout2d dropout3d fractional_max_pool2d fractional_max_pool2d_with_indices
    fractional_max_pool3d fractional_max_pool3d_with_indices gru gumbel_softmax lobpcg lstm
    multi_head_attention_forward pca_lowrank rnn_relu rnn_tanh scaled_dot_product_attention
    svd_lowrank
    """.split()  # noqa: SIM905
)

#: What aten calls the operators of Python.
OPERATORS: Final = MappingProxyType(
    {
        "and": "bitwise_and",
        "floordiv": "floor_divide",
        "invert": "bitwise_not",
        "lshift": "bitwise_left_shift",
        "mod": "remainder",
        "or": "bitwise_or",
        "rshift": "bitwise_right_shift",
        "truediv": "div",
        "xor": "bitwise_xor",
    }
)
PROPERTIES: Final = ("__get__", "__set__")


def main() -> int:
    """Run the program; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if it is old")
    check = parser.parse_args().check
    made = text()
    if not check:
        TARGET.write_text(made, encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != made:
        print(f"{TARGET.name} is not what torch {torch.__version__} gives; generate it anew")
        return 1
    return 0


def allowed() -> list[str]:
    """Every wire name, sorted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functions = [each for group in get_overridable_functions().values() for each in group]
    found = {resolve_name(function) for function in functions}
    found |= {f"torch.{name}" for name in ALSO}
    return sorted(
        name
        for name in found
        if name and refused.reason(name) is None and name not in refused.LOCAL
    )


def base(name: str) -> str:
    """``torch.Tensor.__iadd__``, ``torch._foreach_add`` → ``add``: what aten calls it."""
    word = [part for part in name.split(".") if part not in PROPERTIES][-1]
    if word.startswith("__"):
        word = word.strip("_")
        if word[0] in "ri" and hasattr(torch.Tensor, f"__{word[1:]}__"):
            word = word[1:]
        return OPERATORS.get(word, word)
    return word.removeprefix("_foreach_").strip("_")


def overloads(name: str) -> Iterator[torch._ops.OpOverload]:
    """aten's overloads of that name, in place and not."""
    word, namespace = base(name), name.split(".")[1]
    prefix = {"linalg": "linalg_", "fft": "fft_", "special": "special_"}.get(namespace, "")
    for candidate in (prefix + word, f"{prefix}{word}_", word):
        packet = getattr(torch.ops.aten, candidate, None)
        if packet is not None:
            for overload in packet.overloads():
                yield getattr(packet, overload)


def holds_rows(name: str) -> bool:
    """Whether results hold rows of an argument."""
    word = base(name)
    if word in ROWS or word.endswith("_copy") or name.endswith(PROPERTIES):
        return True
    return any(torch.Tag.pointwise in each.tags or _is_view(each) for each in overloads(name))


def _is_view(overload: torch._ops.OpOverload) -> bool:
    returns = overload._schema.returns
    return any(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def draws(name: str) -> bool:
    """Whether it draws from the default generator."""
    tag = torch.Tag.nondeterministic_seeded
    return base(name) in RANDOM or any(tag in each.tags for each in overloads(name))


def stale() -> list[str]:
    """Words of the lists above that belong to no operation."""
    words = {base(name) for name in allowed()}
    return sorted((ROWS | RANDOM) - words)


# --- the file -------------------------------------------------------------------------------------

HEAD: Final = '''\
"""What a worker may be asked to run. Generated by scripts/generate_ops.py; do not edit."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["NAMES", "RANDOM", "ROWS"]
'''


def text() -> str:
    """The file."""
    if left := stale():
        raise SystemExit(f"no operation is called {', '.join(left)}; remove it from the lists")
    names = allowed()
    groups: dict[str, list[str]] = {space: [] for space in SPACES}
    for name in names:
        space = next(space for space in SPACES if name.startswith(space + "."))
        groups[space].append(name.removeprefix(space + "."))
    titles = {space: "_" + space.upper().replace(".", "_") for space in SPACES}
    parts = [HEAD]
    parts += [block(titles[s], f"In ``{s}``.", words) for s, words in groups.items()]
    listing = "".join(f'        "{space}": {title},\n' for space, title in titles.items())
    parts.append(
        "#: Names by the place they are found in.\n"
        f"NAMES: Final[Mapping[str, str]] = MappingProxyType(\n    {{\n{listing}    }}\n)\n"
    )
    parts.append(block("RANDOM", "What draws random numbers.", filter(draws, names)))
    parts.append(block("ROWS", "What gives back rows of its arguments.", filter(holds_rows, names)))
    return "\n".join(parts)


def block(title: str, comment: str, names: Iterable[str]) -> str:
    """One table as text."""
    lines = textwrap.fill(
        " ".join(names),
        96,
        initial_indent="    ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f'#: {comment}\n{title}: Final = """\n{lines}\n"""\n'


if __name__ == "__main__":
    sys.exit(main())
