"""What travels in a round, made smaller: casts, quantisation, and the largest changes alone.

The model goes out as it is or cast (``broadcast``); what comes back is what a site has *changed*
(``update``), which is small and centred on zero, so it stands coarse rounding better than values.
The client adds it to its own exact model, so strategies see full values, and small changes are not
lost in a coarse model. Both ends of a scheme are here, as functions of tensors: ``encode`` is
recorded on pointers and runs on the worker, ``decode`` runs here.

Buffers (running means, counts) and what is no real floating-point number travel as they are: a
running variance that is rounded may get negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol, TypeAlias

import torch
from torch.nn import functional as F

from wsfed.errors import ConnectionLost, FederatedError, SessionLost, WsfedError
from wsfed.federated.contribution import SecAgg
from wsfed.federated.dp import DP
from wsfed.federated.strategies.scaffold import Scaffold
from wsfed.federated.strategies.strategy import Strategy
from wsfed.pointers import modules

__all__ = [
    *("Cast", "Compression", "Exact", "Quantise", "Scheme", "TopK", "check_fits"),
    *("compression_of", "is_compressed", "negotiate"),
]

_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"fp16": torch.float16, "bf16": torch.bfloat16}
)


class Scheme(Protocol):
    """How changes travel."""

    def encode(
        self, changes: Sequence[torch.Tensor], residual: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """What is sent of these changes, and what is kept for the next round.

        Args:
            changes: of what is trained, trained minus given; none of them is empty.
            residual: what the last round has kept.
        """

    def decode(
        self, told: Sequence[torch.Tensor], shapes: Sequence[torch.Size]
    ) -> list[torch.Tensor]:
        """Changes, as far as they were sent. What was told is used up.

        Args:
            told: what :meth:`encode` gave to be sent; of its shapes and dtypes, with any values.
            shapes: of the changes.

        Raises:
            ValueError: this cannot have been encoded so.
        """


@dataclass(frozen=True, slots=True)
class Exact:
    """Changes as they are: for a model that was cast on its way to the workers."""

    def encode(
        self, changes: Sequence[torch.Tensor], residual: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """See :class:`Scheme`."""
        return list(changes), None

    def decode(
        self, told: Sequence[torch.Tensor], shapes: Sequence[torch.Size]
    ) -> list[torch.Tensor]:
        """See :class:`Scheme`."""
        return list(told)


@dataclass(frozen=True, slots=True)
class Cast:
    """Rounded to the nearest number of a dtype of 16 bits.

    Attributes:
        dtype: ``"fp16"``: 11 bits of precision, and nothing below 6e-8 or above 65504; ``"bf16"``:
            8 bits, and the range of float32.
    """

    dtype: Literal["fp16", "bf16"]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"a cast is to {' or '.join(map(repr, _DTYPES))}, not {self.dtype!r}")

    def cast(self, value: torch.Tensor) -> torch.Tensor:
        """A value in 16 bits, if it has more; else itself."""
        if not value.is_floating_point() or value.dtype.itemsize <= 2:
            return value
        return value.to(_DTYPES[self.dtype])

    def encode(
        self, changes: Sequence[torch.Tensor], residual: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """See :class:`Scheme`."""
        return [self.cast(change) for change in changes], None

    def decode(
        self, told: Sequence[torch.Tensor], shapes: Sequence[torch.Size]
    ) -> list[torch.Tensor]:
        """See :class:`Scheme`."""
        return list(told)


@dataclass(frozen=True, slots=True)
class Quantise:
    """Integers of a few bits, and one scale for each tensor.

    ``s = max |x| / (2 ** (bits - 1) - 1)``, ``q = floor(x / s + u)``, and ``s * q`` is what
    arrives (symmetric, per tensor). Stochastic rounding draws ``u`` between 0 and 1 for each
    number, so the error has no mean (Gupta et al. 2015, *Deep learning with limited numerical
    precision*, section 3; of updates: Konečný et al. 2016, *Federated learning: strategies for
    improving communication efficiency*, section 3); it draws on the worker, after training, so a
    seed settles it. Rounding to the nearest is ``q = round(x / s)``.

    Attributes:
        bits: 8, or 4: two numbers in a byte.
        rounding: see above.
    """

    bits: Literal[4, 8] = 8
    rounding: Literal["stochastic", "nearest"] = "stochastic"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is 4 or 8, not {self.bits!r}")
        if self.rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding is 'stochastic' or 'nearest', not {self.rounding!r}")

    @property
    def _most(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    def encode(
        self, changes: Sequence[torch.Tensor], residual: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """See :class:`Scheme`: all scales, then the integers of each change."""
        told, scales = [], []
        for change in changes:
            change = change.to(torch.float32)
            scale = change.abs().max() / self._most
            told.append(self._quantise(change / scale.clamp(min=_LEAST)))
            scales.append(scale)
        return [torch.stack(scales), *told], None

    def _quantise(self, scaled: torch.Tensor) -> torch.Tensor:
        if self.rounding == "nearest":
            whole = scaled.round()
        else:
            whole = (scaled + torch.rand_like(scaled)).floor()
        whole = whole.clamp(-self._most, self._most)
        return whole.to(torch.int8) if self.bits == 8 else _pack(whole)

    def decode(
        self, told: Sequence[torch.Tensor], shapes: Sequence[torch.Size]
    ) -> list[torch.Tensor]:
        """See :class:`Scheme`."""
        scales, *each = told
        if self.bits == 4:
            each = [_unpack(packed, shape) for packed, shape in zip(each, shapes, strict=True)]
        return [scale * whole for scale, whole in zip(scales, each, strict=True)]


#: The least normal float32: what a tensor of zeros is divided by.
_LEAST: Final = torch.finfo(torch.float32).tiny


def _pack(whole: torch.Tensor) -> torch.Tensor:
    """Numbers from -8 to 7, two in a byte: the first one in the upper half."""
    flat = (whole + 8).to(torch.uint8).reshape(-1)
    pairs = F.pad(flat, (0, flat.numel() % 2)).reshape(-1, 2)
    return pairs[:, 0] * 16 + pairs[:, 1]


def _unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    pairs = torch.stack([packed >> 4, packed & 15], 1)
    return (pairs.reshape(-1)[: shape.numel()].to(torch.int8) - 8).reshape(shape)


@dataclass(frozen=True, slots=True)
class TopK:
    """The changes of largest magnitude, of all tensors together, and where they are.

    With error feedback, ``p = change + e``, the ``k`` largest of ``p`` are sent, and the rest of it
    is the next round's ``e``, which stays on the worker (Stich et al. 2018, *Sparsified SGD with
    memory*, algorithm 1; Karimireddy et al. 2019, *Error feedback fixes SignSGD*, algorithm 2).
    Each site has its own ``e``, as large as what is trained.

    Attributes:
        ratio: share of the numbers that are sent, rounded up; each takes 8 bytes with its place.
        error_feedback: whether what is not sent is kept for later; without it, it is lost.
    """

    ratio: float = 0.01
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is above 0, and at most 1: {self.ratio}")

    def encode(
        self, changes: Sequence[torch.Tensor], residual: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """See :class:`Scheme`: values, then their places in all changes one after the other."""
        flat = torch.cat([change.to(torch.float32).reshape(-1) for change in changes])
        if residual is not None:
            flat = flat + residual
        count = flat.numel()
        places = flat.abs().topk(math.ceil(self.ratio * count), sorted=False).indices
        told = [flat.index_select(0, places), places.to(_index_dtype(count))]
        return told, flat.index_fill(0, places, 0.0) if self.error_feedback else None

    def decode(
        self, told: Sequence[torch.Tensor], shapes: Sequence[torch.Size]
    ) -> list[torch.Tensor]:
        """See :class:`Scheme`."""
        values, places = told[0], told[1].long()
        sizes = [shape.numel() for shape in shapes]
        if int(places.min()) < 0 or int(places.max()) >= sum(sizes):
            raise ValueError("a change is of a place that is not in the model")
        flat = torch.zeros(sum(sizes)).index_put_((places,), values)
        return [
            part.view(shape) for part, shape in zip(torch.split(flat, sizes), shapes, strict=True)
        ]


def _index_dtype(count: int) -> torch.dtype:
    return torch.int32 if count < 2**31 else torch.int64


@dataclass(frozen=True, slots=True)
class Compression:
    """What is made smaller on which way.

    Attributes:
        update: what sites have changed, on its way here; ``None`` to leave it exact.
        broadcast: the model on its way to the workers; ``None`` to leave it exact.
    """

    update: Cast | Quantise | TopK | None = None
    broadcast: Cast | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.update, Cast | Quantise | TopK | None):
            raise TypeError(f"an update is a Cast, Quantise or TopK, not {self.update!r}")
        if not isinstance(self.broadcast, Cast | None):
            raise TypeError(f"the model is broadcast by a Cast or exactly, not {self.broadcast!r}")
        if self.update is None and self.broadcast is None:
            raise ValueError("nothing would be compressed: give update or broadcast")

    @property
    def scheme(self) -> Scheme:
        """How changes travel."""
        return self.update or Exact()


#: What ``fit`` takes: words are short for the commonest.
_Given: TypeAlias = str | Cast | Quantise | TopK | Compression | None

_WORDS: Final[Mapping[str, Cast | Quantise | TopK]] = MappingProxyType(
    {
        "fp16": Cast("fp16"),
        "bf16": Cast("bf16"),
        "int8": Quantise(8),
        "int4": Quantise(4),
        "top-k": TopK(),
    }
)


def compression_of(given: _Given) -> Compression | None:
    """What a word or a scheme alone stands for: casts go both ways, the others are of updates.

    Raises:
        ValueError: an unknown word.
        TypeError: something else.
    """
    if isinstance(given, str):
        if given not in _WORDS:
            raise ValueError(
                f"compression is {', '.join(map(repr, _WORDS))}, or a Cast, Quantise, TopK or "
                f"Compression; not {given!r}"
            )
        given = _WORDS[given]
    if isinstance(given, Cast):
        return Compression(given, given)
    if isinstance(given, Quantise | TopK):
        return Compression(given)
    if not isinstance(given, Compression | None):
        raise TypeError(f"{given!r} is no compression, such as 'bf16' or TopK(0.01)")
    return given


def check_fits(compression: Compression, strategy: Strategy, privacy: SecAgg | DP | None) -> None:
    """Whether this makes sense together with the rest of a training.

    Raises:
        ValueError: it does not.
    """
    what, update = "compression", compression.update
    if isinstance(privacy, SecAgg):
        raise ValueError(
            f"{what} and privacy=SecAgg(…) exclude each other: masked numbers are as large as "
            "they are, and all members need the same model to the bit"
        )
    if isinstance(privacy, DP):
        raise ValueError(
            f"{what} and privacy=DP(…) exclude each other: what is rounded, or put back for later, "
            "after it was clipped need not be within the bound"
        )
    if strategy.wants_gradients:
        raise ValueError(
            f"{what} is of what sites change of a model, and {strategy.name} asks for gradients"
        )
    if isinstance(update, TopK) and strategy.tolerates_garbage:
        raise ValueError(
            f"{what}=TopK(…) leaves out most of each change, and {strategy.name} compares changes "
            "number by number"
        )
    if isinstance(update, TopK) and isinstance(strategy, Scaffold):
        raise ValueError(
            f"{what}=TopK(…) leaves out most of each change, of which Scaffold makes its control "
            "variates"
        )


def is_compressed(name: str, value: torch.Tensor, buffers: frozenset[str]) -> bool:
    """Whether an entry of the model is subject to compression."""
    return name not in buffers and value.is_floating_point() and value.numel() > 0


async def negotiate(worker: Any, compression: Compression) -> None:
    """Have a worker do with a few numbers what it is to do with the model.

    Raises:
        FederatedError: it cannot.
        ConnectionLost, SessionLost: it is gone.
    """
    few, scheme, cast = torch.tensor([0.1, -1.7, 0.0]), compression.scheme, compression.broadcast
    try:
        with torch.no_grad():
            given = worker.send(few if cast is None else cast.cast(few))
            entry = worker.send(torch.zeros(3))
            entry.copy_(given)
            told, kept = scheme.encode([(entry + 1).detach() - given], None)
            if kept is not None:
                told, _ = scheme.encode([entry], kept)
            asked = modules.get(told)
        scheme.decode(await asked, [few.shape])
    except (ConnectionLost, SessionLost):
        raise
    except (WsfedError, ValueError) as error:
        used = compression.update or compression.broadcast
        raise FederatedError(
            f"worker {worker.id!r} cannot take part with compression={used}: {error}"
        ) from error
