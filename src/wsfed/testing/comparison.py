"""Two runs of the same lines, here and on a worker: their arguments, and whether they are equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

from wsfed.pointers.pointer import Pointer

__all__ = [
    "Ran",
    "Side",
    "compare_bits",
    "compare_closely",
    "compare_repeated",
    "compare_runs",
    "strides_of",
]

#: How often local torch is asked whether it repeats itself.
_REPEATS: Final = 40


@dataclass
class Side:
    """The arguments of one run: tensors of their own, each once, however often it is given.

    ``shift``: elements by which tensors here begin later in their memory, which makes the sums of
    some kernels come in another order.
    """

    send: Callable[[torch.Tensor], torch.Tensor] | None
    requires_grad: bool
    shift: int = 0
    tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def give(self, value: Any) -> Any:
        """The same arguments for this side."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self.tensors:
                self.tensors[id(value)] = value, self._own(value)
            return self.tensors[id(value)][1]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.give, value))
        if isinstance(value, list | tuple):
            return type(value)(map(self.give, value))
        if isinstance(value, dict):
            return {key: self.give(each) for key, each in value.items()}
        if isinstance(value, slice):
            return slice(*map(self.give, (value.start, value.stop, value.step)))
        return value

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        # What travels is contiguous, so what stays is made so, too.
        own = tensor.detach().resolve_conj().resolve_neg()
        memory = torch.empty(own.numel() + self.shift, dtype=own.dtype)
        own = (
            memory[self.shift :].view(own.shape).copy_(own)
            if self.shift
            else own.clone(memory_format=torch.contiguous_format)
        )
        own.requires_grad_(tensor.requires_grad and self.requires_grad)
        return own if self.send is None else self.send(own)

    @property
    def own(self) -> list[torch.Tensor]:
        """The tensors of this side, in the order in which they are given."""
        return [own for _, own in self.tensors.values()]


@dataclass
class Ran:
    """What came of one run."""

    results: Any = None
    arguments: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    error: Exception | None = None


class _OtherBits(AssertionError):
    """Everything is as it should be but for the values."""


def compare_repeated(remote: Ran, local: Ran, again: Callable[[int], Ran]) -> None:
    """Compare bit for bit, or closely where local torch does not repeat itself.

    Args:
        remote: what came of the run on the worker.
        local: of the run here.
        again: runs it here once more, with tensors so many elements later in their memory.

    Raises:
        AssertionError: they differ.
    """
    try:
        compare_runs(remote, local, compare_bits)
    except _OtherBits:
        # Where torch's allocator puts things decides the order of some sums of LAPACK.
        elsewhere = [again(shift % 5) for shift in range(_REPEATS)]
        if all(_is_same(each, local) for each in elsewhere):
            raise
        compare_runs(remote, local, compare_closely)


def _is_same(one: Ran, other: Ran) -> bool:
    try:
        compare_runs(one, other, compare_bits)
    except _OtherBits:
        return False
    return True


def compare_runs(
    remote: Ran, local: Ran, compare: Callable[[torch.Tensor, torch.Tensor, str], None]
) -> None:
    """Compare results, arguments and gradients; each tensor by ``compare``."""
    for what, one, other in (
        ("a result", remote.results, local.results),
        ("an argument afterwards", remote.arguments, local.arguments),
        ("a gradient", remote.gradients, local.gradients),
    ):
        ours, theirs = pytree.tree_leaves(other), pytree.tree_leaves(one)
        if len(ours) != len(theirs):
            raise AssertionError(f"{len(theirs)} leaves of {what}, not {len(ours)}")
        for got, expected in zip(theirs, ours, strict=True):
            if isinstance(expected, torch.Tensor):
                if not isinstance(got, torch.Tensor):
                    raise AssertionError(f"{what} is {got!r}, not a tensor")
                compare(got, expected, what)
            elif got != expected and not (got != got and expected != expected):
                raise AssertionError(f"{what} is {got!r}, not {expected!r}")


def compare_bits(remote: torch.Tensor, local: torch.Tensor, what: str) -> None:
    """Metadata and every bit are equal."""
    value = _value(remote, local, what)
    if _bits(value) != _bits(local):
        raise _OtherBits(f"{what} has other values")


def compare_closely(remote: torch.Tensor, local: torch.Tensor, what: str) -> None:
    """Metadata are equal, and values within torch's tolerances."""
    torch.testing.assert_close(_value(remote, local, what), local.detach(), equal_nan=True)


def _value(remote: torch.Tensor, local: torch.Tensor, what: str) -> torch.Tensor:
    """The remote value, once its metadata tell the truth."""
    for name in ("dtype", "shape", "requires_grad", "is_leaf"):
        got, expected = getattr(remote, name), getattr(local, name)
        if got != expected:
            raise AssertionError(f"{name} of {what} is {got}, not {expected}")
    if local.numel() > 1 and strides_of(remote) != strides_of(local):
        raise AssertionError(f"strides of {what} are {remote.stride()}, not {local.stride()}")
    return remote.get().detach() if isinstance(remote, Pointer) else remote.detach()


def strides_of(tensor: torch.Tensor) -> list[int]:
    """The strides that matter: those of sizes above one."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in pairs if size > 1]


def _bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg()
    plain = plain.clone(memory_format=torch.contiguous_format)
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    data: bytes = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return data
