"""Writes src/wsfed/ops/names.py: what a worker may be asked to run.

    python scripts/generate_ops.py            write it
    python scripts/generate_ops.py --check    fail if it would change

The names are those of ``torch.overrides`` (what a Tensor subclass can intercept) less what
``wsfed.ops.refused`` gives a reason against and what is answered on the client. Two properties are
read off torch's own operator schemas: whether results hold rows of an argument (views, and
point-wise operations), and whether the operation draws random numbers.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.overrides import get_overridable_functions, resolve_name

from wsfed.ops import refused

TARGET = Path(__file__).resolve().parent.parent / "src" / "wsfed" / "ops" / "names.py"

#: Assignments and helpers that ``torch.overrides`` does not list.
ALSO = (
    "torch.Tensor.grad.__set__",
    "torch.Tensor.data.__set__",
    "torch.Tensor.requires_grad.__set__",
    "torch.Tensor.real.__set__",
    "torch.Tensor.imag.__set__",
)

#: Results hold rows, and the schema does not show it.
ROWS = """
    alias argsort argwhere as_tensor atleast_1d atleast_2d atleast_3d bfloat16 block_diag bool
    broadcast_tensors byte cartesian_prod cat cdouble cfloat chalf char chunk clone column_stack
    combinations complex concat concatenate constant_pad_nd contiguous copy cpu cuda cummax cummin
    cumprod cumsum data deepcopy detach diag diag_embed diagflat diagonal_scatter diff double
    dropout dstack embedding feature_dropout alpha_dropout feature_alpha_dropout dropout1d
    dropout2d dropout3d flip fliplr flipud float frexp gather grad half hstack index index_add
    index_copy index_fill index_put index_reduce index_select int kthvalue long masked_fill
    masked_scatter masked_select max maximum meshgrid min minimum mode median msort nanmedian
    narrow_copy nonzero normalize one_hot pad pixel_shuffle pixel_unshuffle channel_shuffle
    native_channel_shuffle positive put quantile nanquantile rand_like ravel repeat
    repeat_interleave reshape reshape_as roll rot90 row_stack scatter scatter_add scatter_reduce
    select_scatter short slice_scatter softmax log_softmax softmin sort split stack take
    take_along_dim tile to topk tril triu type type_as unflatten unfold fold unique
    unique_consecutive unsafe_chunk unsafe_split unsafe_split_with_sizes vstack where zero
    getitem setitem reversed interpolate upsample grid_sample max_pool1d max_pool2d max_pool3d
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin aminmax logcumsumexp
    vander kron outer ger cross tensor_split hsplit vsplit dsplit gradient trapezoid
    cumulative_trapezoid histc bincount movedim moveaxis fft ifft rfft irfft fft2 ifft2 rfft2
    irfft2 fftn ifftn rfftn irfftn hfft ihfft hfft2 ihfft2 hfftn ihfftn fftshift ifftshift
""".split()

#: Draws random numbers, and the schema does not show it.
RANDOM = """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout
    gumbel_softmax rrelu multi_head_attention_forward scaled_dot_product_attention
    fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices
    fractional_max_pool3d_with_indices lstm gru rnn_tanh rnn_relu pca_lowrank svd_lowrank lobpcg
    multinomial poisson binomial bernoulli normal uniform exponential geometric cauchy log_normal
    random native_dropout
""".split()

PROPERTIES = ("__get__", "__set__")


def main() -> int:
    """Run the program; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    made = text()
    if parser.parse_args().check:
        if TARGET.read_text() != made:
            print(f"{TARGET.name} is not what torch {torch.__version__} gives; generate it anew")
            return 1
        return 0
    TARGET.write_text(made)
    return 0


def allowed() -> list[str]:
    """Every wire name, sorted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functions = [f for group in get_overridable_functions().values() for f in group]
    found = {resolve_name(function) for function in functions} | set(ALSO)
    return sorted(
        name for name in found if name and refused.reason(name) is None and name not in refused.LOCAL
    )


def base(name: str) -> str:
    """``torch.Tensor.__iadd__`` → ``add``: what aten calls it."""
    parts = [part for part in name.split(".") if part not in PROPERTIES]
    word = parts[-1]
    if word.startswith("__") and word.endswith("__"):
        word = word.strip("_")
        if word[0] in "ri" and hasattr(torch.Tensor, f"__{word[1:]}__"):
            word = word[1:]
        return {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "and": "bitwise_and",
                "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"}.get(word, word)
    return word.rstrip("_")


def packets(word: str, namespace: str) -> Iterator[torch._ops.OpOverload]:
    """aten's overloads of that name, in place and not."""
    prefix = {"linalg": "linalg_", "fft": "fft_", "special": "special_"}.get(namespace, "")
    for candidate in (prefix + word, f"{prefix}{word}_", word):
        packet = getattr(torch.ops.aten, candidate, None)
        if packet is not None:
            for overload in packet.overloads():
                yield getattr(packet, overload)


def holds_rows(name: str) -> bool:
    """Whether results hold rows of an argument."""
    parts = name.split(".")
    if base(name) in ROWS or base(name).removesuffix("_copy") in ROWS or parts[-1] in PROPERTIES:
        return True
    return any(
        torch.Tag.pointwise in overload.tags or _is_view(overload)
        for overload in packets(base(name), parts[1])
    )


def _is_view(overload: torch._ops.OpOverload) -> bool:
    returns = overload._schema.returns
    return any(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def draws(name: str) -> bool:
    """Whether it draws from the default generator."""
    if base(name) in RANDOM:
        return True
    return any(
        torch.Tag.nondeterministic_seeded in overload.tags
        for overload in packets(base(name), name.split(".")[1])
    )


def block(title: str, comment: str, names: Iterable[str]) -> str:
    """One table as text."""
    lines = textwrap.fill(
        " ".join(names), 96, initial_indent="    ", subsequent_indent="    ",
        break_long_words=False, break_on_hyphens=False,
    )
    return f'#: {comment}\n{title}: Final = """\n{lines}\n"""\n'


def text() -> str:
    """The file."""
    names = allowed()
    groups: dict[str, list[str]] = {}
    for name in names:
        space = next(s for s in refused.SPACES if name.startswith(s + "."))
        groups.setdefault(space, []).append(name.removeprefix(space + "."))
    parts = [
        '"""What a worker may be asked to run. Generated by scripts/generate_ops.py; do not edit."""\n',
        "from __future__ import annotations\n\nfrom collections.abc import Mapping\n"
        "from typing import Final\n\n"
        '__all__ = ["NAMES", "RANDOM", "ROWS"]\n',
    ]
    titles = {}
    for space in refused.SPACES:
        titles[space] = "_" + space.replace("torch", "TORCH").replace(".", "_").upper()
        parts.append(block(titles[space], f"In ``{space}``.", groups[space]))
    listing = "\n".join(f'    "{space}": {title},' for space, title in titles.items())
    parts.append(f"#: Names by the place they are found in.\nNAMES: Final[Mapping[str, str]] = {{\n{listing}\n}}\n")
    parts.append(block("RANDOM", "Wire names of what draws random numbers.", filter(draws, names)))
    parts.append(block("ROWS", "Wire names of what gives back rows of its arguments.", filter(holds_rows, names)))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
