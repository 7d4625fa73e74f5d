"""Checks before kernels that believe what a client says.

Most of torch's kernels check indices, sizes and modes before they read. Those below do not, or
only for some of them: with the wrong numbers they read (or write) beyond their tensors, which
gives the client memory of the worker's, or ends the process. ``tests/ops/test_guards.py`` has a
hostile call for each.

A guard has the parameters of its operation and gives the reason for refusing, or ``None``. Reasons
name no values: they may be private.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from wsfed.errors import OpNotAllowed

__all__ = ["guarded"]

Call: TypeAlias = Callable[..., Any]


def guarded(name: str, function: Call) -> Call:
    """The function, or one that checks its arguments first."""
    guard, out = _GUARDS.get(name), _place_of_out(function)
    if name == "torch.nn.functional.linear_cross_entropy":
        return _with_options(function)
    if guard is None and out is None:
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        why = guard(*args, **kwargs) if guard is not None else None
        if out is not None and len(args) > out and args[out] is not None:
            why = "out is refused: results have identifiers of their own; assign with copy_"
        if why is not None:
            raise OpNotAllowed(why, op=name)
        return function(*args, **kwargs)

    return call


def _with_options(function: Call) -> Call:
    """``options=``, which travels as a dictionary, is made again; it checks its own values."""

    def call(*args: Any, options: Any = None, **kwargs: Any) -> Any:
        if not isinstance(options, dict):
            return function(*args, options=options, **kwargs)
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        return function(*args, options=LinearCrossEntropyOptions(**options), **kwargs)

    return call


def _place_of_out(function: Call) -> int | None:
    """Where a function written in Python takes ``out`` by its place."""
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    places = code.co_varnames[: code.co_argcount]
    return places.index("out") if "out" in places else None


def _lu(*args: Any, **kwargs: Any) -> str | None:
    # torch.functional.lu hands on whatever it is given: input, pivot, get_infos, out.
    return "out is refused: assign with copy_" if len(args) > 3 else None


# --- devices named by text ------------------------------------------------------------------------

_TYPE_NAME: Final = re.compile(r"torch\.[A-Z][A-Za-z0-9]*Tensor")


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> str | None:
    own = ("cpu", tensor.device.type, str(tensor.device))
    if any(type(arg) is str and arg not in own for arg in args):
        return "this worker computes on a device of its owner's choice"
    return None


def _type(tensor: Tensor, dtype: Any = None, non_blocking: bool = False) -> str | None:
    if type(dtype) is str and not _TYPE_NAME.fullmatch(dtype):
        return "this is no name of a dense tensor type; use .to(dtype)"
    return None


# --- sizes ----------------------------------------------------------------------------------------


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if min(query.ndim, key.ndim, value.ndim) < 2 or key.shape[-2] != value.shape[-2]:
        return "key and value have to be of the same length"
    return None


def _multi_head(
    *args: Any, static_k: Tensor | None = None, static_v: Tensor | None = None, **kwargs: Any
) -> str | None:
    # Their places are 22 and 23.
    given = [static_k, static_v, *args[21:23]]
    if any(one is not None for one in given):
        return "static_k and static_v are refused: their sizes are not checked"
    return None


def _lstm(input: Tensor, hx: Any, params: Any, *settings: Any) -> str | None:
    if isinstance(hx, Tensor):  # packed: its kernel multiplies matrices, which checks sizes
        return None
    if len(settings) != 6 or type(settings[1]) is not int or len(hx) != 2 or input.ndim != 3:
        return "its arguments are not those that nn.LSTM gives"
    biases, layers, _, _, both, batch_first = settings
    directions = 2 if both else 1
    batch = input.shape[0 if batch_first else 1]
    if any(h.ndim != 3 or h.shape[:2] != (layers * directions, batch) for h in hx):
        return "hidden state and cell state have to be [layers * directions, batch, features]"
    hidden, cell = hx[0].shape[2], hx[1].shape[2]
    wanted: list[tuple[int, ...]] = []
    for layer in range(layers):
        width = hidden * directions if layer else input.shape[2]
        one: list[tuple[int, ...]] = [(4 * cell, width), (4 * cell, hidden)]
        one += [(4 * cell,)] * 2 if biases else []
        one += [(hidden, cell)] if hidden != cell else []
        wanted += one * directions
    if [tuple(weight.shape) for weight in params] != wanted:
        return "the weights' shapes do not fit the input and the states"
    return None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> str | None:
    if type(dim) is not int or not -1 <= dim < v.ndim:
        return "there is no such dimension"
    fits = g.shape == tuple(size if d == dim else 1 for d, size in enumerate(v.shape))
    if (g.numel() != 1 if dim == -1 else not fits) or g.dtype != v.dtype:
        return "g has to have the size of v in that dimension, and its dtype"
    return None


# --- modes ----------------------------------------------------------------------------------------


def _grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: Any, padding_mode: Any, align_corners: Any
) -> str | None:
    most = 2 if input.ndim == 4 else 1
    for mode, last in ((interpolation_mode, most), (padding_mode, 2)):
        if type(mode) is not int or not 0 <= mode <= last:
            return "there is no such interpolation or padding mode"
    return None


# --- numbers --------------------------------------------------------------------------------------


def _matrix_power(*args: Any, n: Any = None, **kwargs: Any) -> str | None:
    # Of n < 0 it makes -n and calls itself; the smallest integer has no opposite: it never ends.
    power = args[1] if len(args) > 1 else n
    fits = type(power) is int and abs(power) < 2**63
    return None if fits else "the power has to be an integer that has an opposite"


# --- indices --------------------------------------------------------------------------------------


def _ctc(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    *args: Any,
    **_: Any,
) -> str | None:
    used = targets
    if targets.ndim == 2:  # beyond its length, a row may hold anything
        lengths = torch.as_tensor(target_lengths, device=targets.device)
        places = torch.arange(targets.shape[1], device=targets.device)
        used = targets[places < lengths.reshape(-1, 1)]
    if bool(((used < 0) | (used >= log_probs.shape[-1])).any()):
        return "a target is no class"
    return None


def _bag(
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, *args: Any, **_: Any
) -> str | None:
    if offsets is not None and bool((offsets[1:] < offsets[:-1]).any()):
        return "offsets have to rise"
    return None


def _raw_bag(
    weight: Tensor, indices: Tensor, offsets: Tensor, *args: Any, **kwargs: Any
) -> str | None:
    return _bag(indices, weight, offsets)


def _pack(input: Tensor, lengths: Tensor, batch_first: bool) -> str | None:
    if bool((lengths > input.shape[1 if batch_first else 0]).any()):
        return "a sequence is longer than the batch"
    return None


def _unpack(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: Any, total_length: int
) -> str | None:
    falls = bool((batch_sizes[1:] <= batch_sizes[:-1]).all() & (batch_sizes > 0).all())
    if not falls or int(batch_sizes.sum()) != data.shape[0]:
        return "batch sizes have to be positive, fall, and sum up to the data's length"
    return None


_GUARDS: Final[Mapping[str, Callable[..., str | None]]] = MappingProxyType(
    {
        "torch.functional.lu": _lu,
        "torch.Tensor.to": _to,
        "torch.Tensor.type": _type,
        "torch.nn.functional.scaled_dot_product_attention": _attention,
        "torch.nn.functional.multi_head_attention_forward": _multi_head,
        "torch.lstm": _lstm,
        "torch._weight_norm": _weight_norm,
        "torch.grid_sampler": _grid_sampler,
        "torch.grid_sampler_2d": _grid_sampler,
        "torch.grid_sampler_3d": _grid_sampler,
        "torch.matrix_power": _matrix_power,
        "torch.Tensor.matrix_power": _matrix_power,
        "torch.linalg.matrix_power": _matrix_power,
        "torch.ctc_loss": _ctc,
        "torch.nn.functional.ctc_loss": _ctc,
        "torch.nn.functional.embedding_bag": _bag,
        "torch.embedding_bag": _raw_bag,
        "torch._pack_padded_sequence": _pack,
        "torch._pad_packed_sequence": _unpack,
    }
)
