"""The owner's data: named files, loaded by the worker's owner and by nobody else.

================  =================================================================================
``.npz``          an array a field (no pickled objects)
``.safetensors``  a tensor a field
``.csv``          numbers, separated by commas; a header names the columns. The column called
                  ``label``, else ``target``, else ``y`` becomes the field ``labels`` (int64 where
                  all are whole numbers, else float32), the others ``features`` (float32)
``.pt``           a dictionary of tensors, a list of them (fields ``"0"``, ``"1"``, …), or one
                  tensor (field ``"data"``); loaded with ``weights_only``
================  =================================================================================

All fields have the same number of rows. What is loaded is the worker's own copy: changing the file
afterwards changes nothing, and neither does what a client writes into a batch.
"""

from __future__ import annotations

import csv
import math
import pickle
import re
import zipfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from wsfed.errors import DatasetError
from wsfed.tensors import DTYPE_NAMES

__all__ = ["Dataset", "load", "parse_option"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_Fields: TypeAlias = dict[str, torch.Tensor]
#: Names of the column with the labels, the most telling first: in x, y, label it is the last.
_LABELS: Final = ("label", "labels", "target", "targets", "y")
#: Orders of rows that are kept: about as many as there are sessions in the middle of an epoch.
_ORDERS: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Rows that stay on the worker.

    Attributes:
        name: what clients ask for.
        fields: tensors by name, all with the same first size.
        open: whether rows may be fetched.
    """

    name: str
    fields: Mapping[str, torch.Tensor] = field(repr=False)
    open: bool = False
    #: The last orders of rows that were asked for; batches of an epoch come one after the other.
    _orders: list[tuple[int, torch.Tensor]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DatasetError(
                self.name, "a data set's name is made of letters, digits and . _ - (64 at most)"
            )
        if not self.fields:
            raise DatasetError(self.name, "there is no field in it")
        for name, tensor in self.fields.items():
            if tensor.ndim == 0:
                raise DatasetError(self.name, f"field {name!r} is one number; a field has rows")
            if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
                kind = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
                raise DatasetError(
                    self.name, f"field {name!r} ({kind}) cannot be sent; make it dense numbers"
                )
        rows = {name: len(tensor) for name, tensor in self.fields.items()}
        if len(set(rows.values())) > 1:
            told = ", ".join(f"{name} has {count}" for name, count in rows.items())
            raise DatasetError(self.name, f"its fields have different numbers of rows: {told}")
        if self.rows == 0:
            raise DatasetError(self.name, "it has no rows")
        object.__setattr__(self, "fields", MappingProxyType(dict(self.fields)))

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(next(iter(self.fields.values())))

    def row_bytes(self, fields: Sequence[str] | None = None) -> int:
        """What one row takes, over these fields; ``None`` for all."""
        return sum(tensor[:1].nbytes for tensor in self._chosen(fields))

    def _chosen(self, fields: Sequence[str] | None) -> list[torch.Tensor]:
        if fields is None:
            return list(self.fields.values())
        unknown = [name for name in fields if name not in self.fields]
        if unknown:
            known = ", ".join(map(repr, self.fields))
            raise KeyError(f"there is no field {unknown[0][:100]!r}; there is {known}")
        return [self.fields[name] for name in fields]

    def batch(
        self,
        seed: int | None,
        batch_size: int,
        index: int,
        fields: Sequence[str] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """One batch: a tensor for each field, the last batch as long as rows are left.

        The tensors are copies: what is written into them stays theirs. The same batch in plain
        torch, of the same file::

            order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
            chosen = order[index * batch_size : (index + 1) * batch_size]
            batch = tuple(tensor[chosen] for tensor in fields.values())

        Args:
            seed: ``None`` for the rows' own order, else see above.
            batch_size: rows of a full batch.
            index: which batch, from 0.
            fields: names, ``None`` for all of them in their order.

        Raises:
            IndexError: there is no such batch.
            KeyError: there is no such field.
        """
        start = index * batch_size
        if batch_size < 1 or not 0 <= start < self.rows:
            raise IndexError(f"{self.rows} rows have no batch {index} of {batch_size}")
        stop = min(start + batch_size, self.rows)
        if seed is None:
            return tuple(_copy(tensor[start:stop]) for tensor in self._chosen(fields))
        chosen = self._order_of(seed)[start:stop]
        return tuple(
            tensor.detach().index_select(0, chosen.to(tensor.device))
            for tensor in self._chosen(fields)
        )

    def _order_of(self, seed: int) -> torch.Tensor:
        # Read once: another session's thread may put its order in at any time.
        for known, order in tuple(self._orders):
            if known == seed:
                return order
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        self._orders[:] = [(seed, order), *self._orders[: _ORDERS - 1]]
        return order


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, in memory of torch's own, outside autograd."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def parse_option(text: str) -> tuple[str, Path]:
    """``"scans=/data/scans.npz"`` → name and path.

    Raises:
        ValueError: not of that form.
    """
    name, separator, path = text.partition("=")
    if not separator or not path or not _NAME.fullmatch(name):
        raise ValueError(f"{text!r} is not NAME=PATH, such as digits=digits.npz")
    return name, Path(path).expanduser()


def load(
    name: str, path: str | Path, *, open: bool = False, device: str | torch.device = "cpu"
) -> Dataset:
    """Load a data set.

    Args:
        name: what clients ask for.
        path: of the file; its suffix tells the format.
        open: whether rows may be fetched.
        device: where it is kept.

    Raises:
        DatasetError: the file is missing, malformed, or unfit; the text says what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise DatasetError(str(path), "this is a folder; give a file")
    suffix = path.suffix.lower()
    if suffix not in _LOADERS:
        known = " ".join(sorted(_LOADERS))
        raise DatasetError(str(path), f"its suffix {path.suffix!r} is not one of {known}")
    try:
        return Dataset(name, _place(_LOADERS[suffix](path), device), open)
    except FileNotFoundError:
        raise DatasetError(str(path), "there is no such file") from None
    except OSError as error:
        raise DatasetError(str(path), error.strerror or str(error)) from None
    except MemoryError:
        raise DatasetError(str(path), "it does not fit into this machine's memory") from None
    except _Unfit as error:
        raise DatasetError(str(path), str(error)) from None
    except DatasetError as error:
        raise DatasetError(str(path), error.reason) from None
    except Exception as error:  # what the formats' readers raise for damaged bytes has no end
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DatasetError(str(path), f"it is damaged, or no {suffix} file ({reason})") from None


def _place(fields: Mapping[str, torch.Tensor], device: str | torch.device) -> _Fields:
    """Copies of the worker's own: no field shares memory with another, or with the file."""
    return {
        name: (_copy(value) if value.layout is torch.strided else value).to(device)
        for name, value in fields.items()
    }


# --- one function a format -----------------------------------------------------------------------


class _Unfit(Exception):
    """The file can be read, and is not what it has to be; the text says why."""


def _load_npz(path: Path) -> _Fields:
    with path.open("rb") as file:  # numpy leaves a damaged file open that it opened itself
        if file.read(6) == b"\x93NUMPY":
            raise _Unfit("it holds one array without a name; write it with numpy.savez")
        if not zipfile.is_zipfile(file):
            raise _Unfit("it is no .npz file; write it with numpy.savez")
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            return {name: _from_numpy(archive, name) for name in archive.files}


def _from_numpy(archive: Any, name: str) -> torch.Tensor:
    try:
        values = archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise _Unfit(
            f"field {name!r} holds Python objects, which are never unpickled; save plain arrays"
        ) from None
    if not isinstance(values, np.ndarray):
        raise _Unfit(f"{name!r} in it is no array; write it with numpy.savez")
    try:
        return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
    except TypeError:
        raise _Unfit(f"field {name!r} is {values.dtype}; encode it as numbers first") from None


def _load_safetensors(path: Path) -> _Fields:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise _Unfit("safetensors is not installed: pip install 'wsfed[safetensors]'") from None
    return dict(load_file(path))


def _load_pt(path: Path) -> _Fields:
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:  # its text advises to load the file without this protection
        raise _Unfit(
            "it holds more than tensors, or is no .pt file; torch.save a dictionary of tensors"
        ) from None
    if isinstance(value, torch.Tensor):
        return {"data": value}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict) and all(isinstance(each, torch.Tensor) for each in value.values()):
        return {str(name): each for name, each in value.items()}
    raise _Unfit("it is no tensor, and no dictionary or list of nothing but tensors")


def _load_csv(path: Path) -> _Fields:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        return _read_table((reader.line_num, row) for row in reader if row)


def _read_table(lines: Iterator[tuple[int, list[str]]]) -> _Fields:
    line, first = next(lines, (0, []))
    if not first:
        raise _Unfit("it is empty")
    header = None if all(_number(cell) is not None for cell in first) else first
    if header is None and all(math.isnan(float(cell)) for cell in first):
        raise _Unfit(f"line {line} is nothing but nan: no names, and no numbers")
    # Not lists of rows: those would take ten times the memory.
    values = array("d", () if header else _numbers(line, first, len(first)))
    for line, row in lines:
        values.extend(_numbers(line, row, len(first)))
    if not values:
        raise _Unfit("it has a header and no rows")
    table = torch.frombuffer(values, dtype=torch.float64).view(-1, len(first))
    return _columns(table, [name.strip().lower() for name in header or ()])


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _numbers(line: int, row: Sequence[str], width: int) -> list[float]:
    if len(row) != width:
        raise _Unfit(f"line {line} has {len(row)} columns where the first has {width}")
    numbers = []
    for cell in row:
        number = _number(cell)
        if number is None:
            raise _Unfit(
                f"line {line}: {cell[:40]!r} is no number; separate columns by commas, "
                "write nan for what is missing, and encode text as numbers"
            )
        numbers.append(number)
    return numbers


def _columns(table: torch.Tensor, names: Sequence[str]) -> _Fields:
    place = next((names.index(name) for name in _LABELS if name in names), None)
    others = [column for column in range(table.shape[1]) if column != place]
    fields = {"features": table[:, others].to(torch.float32)} if others else {}
    if place is not None:
        labels = table[:, place]
        # Up to 2 ** 53 a float64 holds every whole number; this is false for nan and inf, too.
        whole = bool(((labels == labels.round()) & (labels.abs() <= 2**53)).all())
        fields["labels"] = labels.to(torch.int64 if whole else torch.float32)
    return fields


_LOADERS: Final[Mapping[str, Callable[[Path], _Fields]]] = MappingProxyType(
    {".npz": _load_npz, ".safetensors": _load_safetensors, ".csv": _load_csv, ".pt": _load_pt}
)
