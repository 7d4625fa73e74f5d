"""What the owner has done to fields while they are loaded: a closed table of named transforms.

``"scans/images=resize:28,28"`` names a data set, a field of it, the transform, and after a colon
its parameters, separated by commas. They have names (``mean=0.5,std=0.25``); the first may go
without (``cast:float32`` is ``cast:dtype=float32``), and so may the further values of a list
(``mean=0.4,0.5,std=0.2,0.3``). Several transforms are separated by ``|``.

Each transform is a frozen value that gives what stands in the field's place. None of them changes
the number of rows. A "column" below is an index of the field's second dimension: a column of a
table, a channel of images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol, TypeAlias

import torch

from wsfed.errors import DatasetError
from wsfed.tensors import DTYPES, describe
from wsfed.worker.columns import Column, Columns, Pictures, Texts, Unfit, allocate, tensor_of
from wsfed.worker.tokenisers import tokenise

__all__ = [
    *("Cast", "Drop", "FillNan", "Flatten", "Normalise", "OneHot", "Rename", "Reshape", "Resize"),
    *("Scale", "Select", "Tokenise", "Transform", "TRANSFORMS"),
    *("parse_transform", "transformed"),
]


class Transform(Protocol):
    """What becomes of one field."""

    def __call__(self, name: str, column: Column) -> Columns:
        """What stands in the place of the field of that name.

        Raises:
            Unfit: it cannot be done to such a field.
        """
        ...


def transformed(columns: Columns, steps: Sequence[tuple[str, Transform]]) -> Columns:
    """Apply transforms, one after the other.

    Args:
        columns: by name; it is left as it is.
        steps: a field's name and what is done to it.

    Raises:
        Unfit: there is no such field, or it is unfit for the transform.
    """
    for name, transform in steps:
        if name not in columns:
            raise Unfit(f"there is no field {name!r}; there is {', '.join(map(repr, columns))}")
        try:
            made = transform(name, columns[name])
        except Unfit as error:
            raise Unfit(f"{_title(transform)} of field {name!r}: {error}") from None
        taken = next((each for each in made if each != name and each in columns), None)
        if taken is not None:
            raise Unfit(
                f"{_title(transform)} of field {name!r}: there is a field {taken!r} already"
            )
        before = list(columns.items())
        columns = {}
        for each, column in before:
            columns.update(made if each == name else {each: column})
    return columns


def _title(transform: Transform) -> str:
    titles = {kind: title for title, kind in TRANSFORMS.items()}
    return titles.get(type(transform), type(transform).__name__)


# --- parameters ----------------------------------------------------------------------------------


class _Malformed(Exception):
    """A parameter is not of the form that the text tells."""


def _read(read: Callable[[Sequence[str]], Any]) -> Mapping[str, Any]:
    """How the values of a transform's parameter are read from the command line."""
    return {"read": read}


def _word(values: Sequence[str]) -> str:
    if len(values) != 1 or not values[0]:
        raise _Malformed("one word")
    return values[0]


def _dtype(values: Sequence[str]) -> torch.dtype:
    if len(values) != 1 or values[0] not in DTYPES:
        raise _Malformed(f"one of {', '.join(DTYPES)}")
    return DTYPES[values[0]]


def _real(text: str) -> float:
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise _Malformed("numbers, such as 0.5 or 1/255")
    return value


def _number(values: Sequence[str]) -> float:
    if len(values) != 1:
        raise _Malformed("one number")
    return _real(values[0])


def _numbers(values: Sequence[str]) -> float | tuple[float, ...]:
    return _real(values[0]) if len(values) == 1 else tuple(map(_real, values))


def _numbers_or_auto(values: Sequence[str]) -> float | tuple[float, ...] | Literal["auto"]:
    return "auto" if list(values) == ["auto"] else _numbers(values)


def _integers(values: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(map(int, values))
    except ValueError:
        raise _Malformed("whole numbers") from None


def _count(values: Sequence[str]) -> int:
    (count, *more) = _integers(values)
    if count < 1 or more:
        raise _Malformed("one whole number from 1")
    return count


def _size(values: Sequence[str]) -> tuple[int, int]:
    match _integers(values):
        case (side,) if side > 0:
            return side, side
        case (height, width) if height > 0 and width > 0:
            return height, width
    raise _Malformed("a side, or height and width, in pixels from 1")


# --- what they need ------------------------------------------------------------------------------


def _tensor(column: Column) -> torch.Tensor:
    values = tensor_of(column)
    if values.layout is not torch.strided:
        raise Unfit("it is sparse; make it dense")
    return values


def _floating(column: Column) -> torch.Tensor:
    """In the dtype to calculate in: float64 stays, all else becomes float32."""
    values = _tensor(column)
    if values.is_complex():
        raise Unfit(f"it is {describe(values)}; split it into real numbers first")
    return values if values.dtype is torch.float64 else values.to(torch.float32)


_Numbers: TypeAlias = float | Sequence[float]


def _along(given: _Numbers, values: torch.Tensor) -> torch.Tensor:
    """One number for all, or one a column, in the shape that fits ``values``."""
    numbers = torch.as_tensor(given, dtype=values.dtype)
    if numbers.ndim == 0:
        return numbers
    if values.ndim < 2 or numbers.shape != (values.shape[1],):
        raise Unfit(f"{len(numbers)} numbers do not fit {describe(values)}: one a column, or one")
    return numbers.reshape(-1, *[1] * (values.ndim - 2))


# --- one class a transform -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cast:
    """Another dtype. Whole numbers lose fractions; what is beyond them is refused.

    Attributes:
        dtype: the new one.
    """

    dtype: torch.dtype = field(metadata=_read(_dtype))

    def __call__(self, name: str, column: Column) -> Columns:
        """The field in the new dtype."""
        values = _tensor(column)
        if values.is_complex() and not self.dtype.is_complex:
            raise Unfit(f"it is {describe(values)}, which real numbers cannot hold")
        whole = not (self.dtype.is_floating_point or self.dtype.is_complex)
        if whole and self.dtype is not torch.bool and len(values):
            _check_range(values, self.dtype)
        return {name: values.to(self.dtype)}


def _check_range(values: torch.Tensor, dtype: torch.dtype) -> None:
    if values.numel() == 0 or values.dtype in (dtype, torch.bool):
        return
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise Unfit("it has nan or inf, which no whole number can be; fill_nan first")
    # torch has no minimum of the larger unsigned integers.
    known = values.numpy() if values.dtype in _UNSIGNED else values
    limits = torch.iinfo(dtype)
    for value in (known.min().item(), known.max().item()):
        if not limits.min <= int(value) <= limits.max:
            raise Unfit(f"{value:g} is beyond {str(dtype).removeprefix('torch.')}")


_UNSIGNED: Final = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True, slots=True)
class Scale:
    """``x * factor + offset``, as float32 (float64 stays).

    Attributes:
        factor: one number, or one a column.
        offset: the same.
    """

    factor: _Numbers = field(default=1.0, metadata=_read(_numbers))
    offset: _Numbers = field(default=0.0, metadata=_read(_numbers))

    def __call__(self, name: str, column: Column) -> Columns:
        """The field in another unit."""
        values = _floating(column)
        return {name: values * _along(self.factor, values) + _along(self.offset, values)}


@dataclass(frozen=True, slots=True)
class Normalise:
    """``(x - mean) / std``, as float32 (float64 stays).

    ``"auto"`` takes what these rows have, a column each, with the standard deviation of all rows
    (not of a sample), and 1 where that is 0. The result then depends on private rows: who knows one
    row before and after learns the mean, and it differs from worker to worker.

    Attributes:
        mean: one number, one a column, or ``"auto"``.
        std: the same.
    """

    mean: _Numbers | Literal["auto"] = field(metadata=_read(_numbers_or_auto))
    std: _Numbers | Literal["auto"] = field(metadata=_read(_numbers_or_auto))

    def __call__(self, name: str, column: Column) -> Columns:
        """The field, centred and scaled."""
        values = _floating(column)
        if "auto" in (self.mean, self.std) and not bool(values.isfinite().all()):
            raise Unfit("it has nan or inf, so it has no mean; fill_nan first, or give numbers")
        mean = self.mean if not isinstance(self.mean, str) else _moments(values)[0]
        std = self.std if not isinstance(self.std, str) else _moments(values)[1]
        divisor = _along(std, values)
        if not bool((divisor > 0).all()):
            raise Unfit("std has to be above 0")
        return {name: (values - _along(mean, values)) / divisor}


def _moments(values: torch.Tensor) -> tuple[_Numbers, _Numbers]:
    """Mean and standard deviation, a column each."""
    columns = values.to(torch.float64)
    columns = columns.movedim(1, 0).flatten(1) if values.ndim > 1 else columns.reshape(1, -1)
    std, mean = torch.std_mean(columns, dim=1, correction=0)
    std[std == 0] = 1
    if values.ndim > 1:
        return mean.tolist(), std.tolist()
    return mean.item(), std.item()


@dataclass(frozen=True, slots=True)
class OneHot:
    """Whole numbers as float32 zeros with a one at their place, in a new last dimension.

    Attributes:
        classes: how many there are.
    """

    classes: int = field(metadata=_read(_count))

    def __call__(self, name: str, column: Column) -> Columns:
        """The field, ``[rows, …, classes]``."""
        values = _tensor(column)
        if values.is_floating_point() or values.is_complex() or values.dtype is torch.bool:
            raise Unfit(f"it is {describe(values)}; cast it to int64 first")
        places = values.to(torch.int64)
        wrong = places[(places < 0) | (places >= self.classes)]
        if len(wrong):
            raise Unfit(
                f"{wrong[0].item()} is no class of {self.classes} (0 to {self.classes - 1})"
            )
        encoded = allocate((*places.shape, self.classes), torch.float32).zero_()
        return {name: encoded.scatter_(-1, places.unsqueeze(-1), 1.0)}


@dataclass(frozen=True, slots=True)
class Flatten:
    """One dimension of all that a row has."""

    def __call__(self, name: str, column: Column) -> Columns:
        """The field, ``[rows, numbers of a row]``."""
        values = _tensor(column)
        return {name: values.reshape(len(values), math.prod(values.shape[1:]))}


@dataclass(frozen=True, slots=True)
class Reshape:
    """Another shape of a row.

    Attributes:
        shape: without the rows; one size may be -1, for what is left.
    """

    shape: Sequence[int] = field(metadata=_read(_integers))

    def __call__(self, name: str, column: Column) -> Columns:
        """The field, ``[rows, *shape]``."""
        values = _tensor(column)
        try:
            return {name: values.reshape(len(values), *self.shape)}
        except (RuntimeError, TypeError):
            shown = ", ".join(map(str, self.shape))
            raise Unfit(f"rows of {describe(values)} cannot have the shape {shown}") from None


@dataclass(frozen=True, slots=True)
class Select:
    """Some columns, in the order they are given in.

    Attributes:
        columns: their places, from 0.
    """

    columns: Sequence[int] = field(metadata=_read(_integers))

    def __call__(self, name: str, column: Column) -> Columns:
        """The field, ``[rows, len(columns), …]``."""
        values = _tensor(column)
        if values.ndim < 2:
            raise Unfit(f"it is {describe(values)}, which has no columns")
        wrong = [place for place in self.columns if not 0 <= place < values.shape[1]]
        if wrong:
            raise Unfit(f"there is no column {wrong[0]}; there are 0 to {values.shape[1] - 1}")
        return {name: values[:, list(self.columns)]}


@dataclass(frozen=True, slots=True)
class Rename:
    """Another name.

    Attributes:
        to: the new name.
    """

    to: str = field(metadata=_read(_word))

    def __call__(self, name: str, column: Column) -> Columns:
        """The field under the new name."""
        return {self.to: column}


@dataclass(frozen=True, slots=True)
class Drop:
    """Leave the field out."""

    def __call__(self, name: str, column: Column) -> Columns:
        """Nothing."""
        return {}


@dataclass(frozen=True, slots=True)
class Resize:
    """Images of another size (bilinear, smoothed where they become smaller).

    Attributes:
        size: height and width in pixels.
    """

    size: tuple[int, int] = field(metadata=_read(_size))

    def __call__(self, name: str, column: Column) -> Columns:
        """The field, ``[rows, channels, *size]``, in its own dtype."""
        if isinstance(column, Pictures):
            return {name: column.stack(self.size, self._resized)}
        images = _tensor(column)
        if images.ndim != 4 or not (
            images.dtype is torch.uint8 or images.dtype in (torch.float32, torch.float64)
        ):
            raise Unfit(
                f"it is {describe(images)}, no images: uint8 or float32 [rows, channels, height, "
                "width]"
            )
        if 0 in images.shape:
            raise Unfit(f"it is {describe(images)}: there is no pixel in it")
        resized = allocate((*images.shape[:2], *self.size), images.dtype)
        for row, image in enumerate(images):
            resized[row] = self._resized(image)
        return {name: resized}

    def _resized(self, image: torch.Tensor) -> torch.Tensor:
        if image.shape[1:] == self.size:
            return image
        resized: torch.Tensor = torch.nn.functional.interpolate(
            image.unsqueeze(0).contiguous(), self.size, mode="bilinear", antialias=True
        )
        return resized.squeeze(0)


@dataclass(frozen=True, slots=True)
class FillNan:
    """A number in the place of ``nan``.

    Attributes:
        value: the number.
    """

    value: float = field(metadata=_read(_number))

    def __call__(self, name: str, column: Column) -> Columns:
        """The field without ``nan``."""
        values = _tensor(column)
        return {name: values.masked_fill(values.isnan(), self.value)}


@dataclass(frozen=True, slots=True)
class Tokenise:
    """Text as token ids.

    Attributes:
        tokeniser: ``"bytes"`` or the path of a ``tokenizer.json``
            (:func:`wsfed.worker.tokenisers.tokenise`).
        length: tokens a row: longer texts are cut, shorter ones filled up.
    """

    tokeniser: str = field(metadata=_read(_word))
    length: int = field(metadata=_read(_count))

    def __call__(self, name: str, column: Column) -> Columns:
        """The fields ``tokens``, int64 ``[rows, length]``, and ``lengths``, int64 ``[rows]``."""
        if not isinstance(column, Texts):
            raise Unfit("it is no text")
        tokens, lengths = tokenise(column.rows, self.tokeniser, self.length)
        return {"tokens": tokens, "lengths": lengths}


#: All there are, by their names on the command line.
TRANSFORMS: Final[Mapping[str, type[Transform]]] = MappingProxyType(
    {
        "cast": Cast,
        "drop": Drop,
        "fill_nan": FillNan,
        "flatten": Flatten,
        "normalise": Normalise,
        "one_hot": OneHot,
        "rename": Rename,
        "reshape": Reshape,
        "resize": Resize,
        "scale": Scale,
        "select": Select,
        "tokenise": Tokenise,
    }
)


# --- the option of the command line --------------------------------------------------------------


def parse_transform(text: str) -> tuple[str, list[tuple[str, Transform]]]:
    """``"scans/images=resize:28|flatten"`` → data set, and for each step the field and the deed.

    Raises:
        DatasetError: not of that form, or there is no such transform or parameter.
    """
    target, separator, steps = text.partition("=")
    name, slash, chosen = target.partition("/")
    if not separator or not slash or not name or not chosen:
        raise DatasetError(
            text, "this is not NAME/FIELD=TRANSFORM, such as digits/images=cast:float32"
        )
    parsed: list[tuple[str, Transform]] = []
    for step in steps.split("|"):
        try:
            transform = _parse_step(step.strip())
        except Unfit as error:
            raise DatasetError(text, str(error)) from None
        parsed.append((chosen, transform))
        if isinstance(transform, Rename):  # what comes after it is done to the same field
            chosen = transform.to
    return name, parsed


def _parse_step(text: str) -> Transform:
    title, _, given = text.partition(":")
    if title not in TRANSFORMS:
        raise Unfit(f"there is no transform {title!r}; there is {', '.join(TRANSFORMS)}")
    kind: Any = TRANSFORMS[title]
    known = {each.name: each for each in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, words in _parse_parameters(title, given, list(known)).items():
        try:
            values[name] = known[name].metadata["read"](words)
        except _Malformed as error:
            raise Unfit(f"{title}: {name}={','.join(words)} has to be {error}") from None
    missing = [
        name
        for name, each in known.items()
        if name not in values and each.default is dataclasses.MISSING
    ]
    if missing:
        raise Unfit(f"{title} needs {' and '.join(missing)}, such as {_example(title)}")
    transform: Transform = kind(**values)
    return transform


def _parse_parameters(title: str, given: str, known: Sequence[str]) -> dict[str, list[str]]:
    """``"mean=0.4,0.5,std=0.2"`` → values by parameter, as they were written."""
    values: dict[str, list[str]] = {}
    if not given:
        return values
    current: list[str] | None = None
    for piece in given.split(","):
        name, named, value = piece.partition("=")
        if not named:
            name, value = known[0] if known else piece, piece
        if named or current is None:
            if name not in known:
                there = f"it has {', '.join(known)}" if known else "it has none"
                raise Unfit(f"{title} has no parameter {name!r}; {there}")
            if name in values:
                raise Unfit(f"{title}: {name} is given twice")
            current = values[name] = []
        current.append(value)
    return values


def _example(title: str) -> str:
    examples = {
        "cast": "cast:float32",
        "fill_nan": "fill_nan:0",
        "normalise": "normalise:mean=0.5,std=0.25",
        "one_hot": "one_hot:10",
        "rename": "rename:labels",
        "reshape": "reshape:1,28,28",
        "resize": "resize:28",
        "select": "select:0,2",
        "tokenise": "tokenise:bytes,length=128",
    }
    return examples[title]
