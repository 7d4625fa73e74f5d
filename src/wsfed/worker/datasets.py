"""The owner's data: named files, loaded by the worker's owner and by nobody else.

===============  ==================================================================================
``.npz``         an array a field (no pickled objects)
``.safetensors``  a tensor a field
``.csv``         numbers; a header names the columns. A column called ``label``, ``target`` or ``y``
                 becomes the field ``labels`` (int64 where all are whole), the others ``features``
``.pt``          a tensor, or a dictionary of tensors (``weights_only``)
===============  ==================================================================================

All fields have the same number of rows.
"""

from __future__ import annotations

import csv
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch

from wsfed.errors import DatasetError
from wsfed.tensors import DTYPE_NAMES

__all__ = ["Dataset", "load", "parse_option"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LABELS: Final = frozenset({"label", "labels", "target", "targets", "y"})


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows that stay on the worker.

    Attributes:
        name: what clients ask for.
        fields: tensors by name, all with the same first size.
        open: whether rows may be fetched.
    """

    name: str
    fields: Mapping[str, torch.Tensor]
    open: bool = False
    #: The last order of rows that was asked for; batches of an epoch come one after the other.
    _order: list[tuple[int, torch.Tensor]] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DatasetError(
                self.name, "a data set's name is made of letters, digits and . _ - (64 at most)"
            )
        if not self.fields:
            raise DatasetError(self.name, "there is no field in it")
        for name, tensor in self.fields.items():
            if tensor.ndim == 0 or tensor.dtype not in DTYPE_NAMES:
                raise DatasetError(
                    self.name,
                    f"field {name!r} is {tensor.dtype} of {tensor.ndim} dimensions; "
                    "a field has rows of numbers",
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

    def batch(self, seed: int | None, batch_size: int, index: int) -> tuple[torch.Tensor, ...]:
        """One batch: a tensor for each field, the last batch as long as rows are left.

        Args:
            seed: ``None`` for the rows' own order, else that of
                ``torch.randperm(rows, generator=torch.Generator().manual_seed(seed))``.
            batch_size: rows of a full batch.
            index: which batch, from 0.

        Raises:
            IndexError: there is no such batch.
        """
        start = index * batch_size
        if batch_size < 1 or not 0 <= start < self.rows:
            raise IndexError(f"{self.rows} rows have no batch {index} of {batch_size}")
        stop = min(start + batch_size, self.rows)
        if seed is None:
            return tuple(tensor[start:stop] for tensor in self.fields.values())
        chosen = self._order_of(seed)[start:stop]
        return tuple(
            tensor.index_select(0, chosen.to(tensor.device)) for tensor in self.fields.values()
        )

    def _order_of(self, seed: int) -> torch.Tensor:
        # Read once: another session's thread may put its order in at any time.
        for known, order in tuple(self._order):
            if known == seed:
                return order
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        self._order[:] = [(seed, order), *self._order[:7]]
        return order


def parse_option(text: str) -> tuple[str, Path]:
    """``"scans=/data/scans.npz"`` → name and path.

    Raises:
        ValueError: not of that form.
    """
    name, separator, path = text.partition("=")
    if not separator or not path or not _NAME.fullmatch(name):
        raise ValueError(f"{text!r} is not NAME=PATH, such as digits=digits.npz")
    return name, Path(path)


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
    loader = _LOADERS.get(path.suffix.lower())
    if loader is None:
        known = " ".join(sorted(_LOADERS))
        raise DatasetError(str(path), f"its suffix {path.suffix!r} is not one of {known}")
    if path.is_dir():
        raise DatasetError(str(path), "this is a folder; give a file")
    try:
        fields = loader(path)
    except FileNotFoundError:
        raise DatasetError(str(path), "there is no such file") from None
    except OSError as error:
        raise DatasetError(str(path), error.strerror or str(error)) from None
    try:
        return Dataset(name, {key: value.to(device) for key, value in fields.items()}, open)
    except DatasetError as error:
        raise DatasetError(str(path), error.reason) from None


# --- one function a format -----------------------------------------------------------------------


def _load_npz(path: Path) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DatasetError(str(path), "it holds one unnamed array; write it with np.savez")
            return {name: _from_numpy(path, name, archive[name]) for name in archive.files}
    except (zipfile.BadZipFile, EOFError) as error:
        raise DatasetError(str(path), f"it is no .npz file: {error}") from None
    except ValueError as error:
        if "allow_pickle" in str(error) or "pickle" in str(error):
            raise DatasetError(
                str(path), "it holds Python objects, which are never unpickled; save plain arrays"
            ) from None
        raise DatasetError(str(path), f"it is no .npz file: {error}") from None


def _from_numpy(path: Path, name: str, array: Any) -> torch.Tensor:
    try:
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return torch.from_numpy(array.copy())
    except TypeError:
        raise DatasetError(
            str(path), f"field {name!r} is {array.dtype}, which is no number of torch's"
        ) from None


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise DatasetError(
            str(path), "safetensors is not installed: pip install 'wsfed[safetensors]'"
        ) from None
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise DatasetError(str(path), f"it is no .safetensors file: {error}") from None


def _load_pt(path: Path) -> dict[str, torch.Tensor]:
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DatasetError(
            str(path), f"it holds more than tensors, or is no .pt file ({reason})"
        ) from None
    if isinstance(value, torch.Tensor):
        return {"data": value}
    if isinstance(value, dict) and all(isinstance(each, torch.Tensor) for each in value.values()):
        return {str(name): each.detach() for name, each in value.items()}
    raise DatasetError(str(path), "it is no tensor and no dictionary of tensors")


def _load_csv(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [
                (reader.line_num, row) for reader in [csv.reader(file)] for row in reader if row
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(str(path), f"it is no .csv file of text: {error}") from None
    if not rows:
        raise DatasetError(str(path), "it is empty")
    header = None if _is_numbers(rows[0][1]) else [cell.strip() for cell in rows[0][1]]
    body = rows if header is None else rows[1:]
    if not body:
        raise DatasetError(str(path), "it has a header and no rows")
    width = len(rows[0][1])
    table = np.array([_numbers(path, line, row, width) for line, row in body])
    return _columns(table, header)


def _is_numbers(row: list[str]) -> bool:
    try:
        return all(math.isfinite(float(cell)) for cell in row)
    except ValueError:
        return False


def _numbers(path: Path, line: int, row: list[str], width: int) -> list[float]:
    if len(row) != width:
        raise DatasetError(str(path), f"line {line} has {len(row)} columns where {width} are due")
    try:
        return [float(cell) for cell in row]
    except ValueError:
        odd = next(cell for cell in row if not _is_numbers([cell]))
        raise DatasetError(
            str(path), f"line {line}: {odd[:40]!r} is no number; encode text as numbers first"
        ) from None


def _columns(table: Any, header: list[str] | None) -> dict[str, torch.Tensor]:
    names = [name.lower() for name in header or []]
    place = next((place for place, name in enumerate(names) if name in _LABELS), None)
    if place is None:
        return {"features": torch.from_numpy(table).to(torch.float32)}
    labels = torch.from_numpy(table[:, place].copy())
    whole = bool((labels == labels.round()).all())
    fields = {"labels": labels.to(torch.int64 if whole else torch.float32)}
    if table.shape[1] > 1:
        features = np.delete(table, place, axis=1)
        fields = {"features": torch.from_numpy(features).to(torch.float32), **fields}
    return fields


_LOADERS: Final[Mapping[str, Callable[[Path], dict[str, torch.Tensor]]]] = MappingProxyType(
    {".npz": _load_npz, ".safetensors": _load_safetensors, ".csv": _load_csv, ".pt": _load_pt}
)
