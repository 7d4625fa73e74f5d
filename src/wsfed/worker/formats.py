"""One function a format: a file of the owner's becomes columns by name.

Nothing is unpickled and nothing is evaluated. What a file has to be is told with
:class:`~wsfed.worker.columns.Unfit`; other exceptions mean that it is damaged.
"""

from __future__ import annotations

import csv
import math
import pickle
import re
import zipfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch

from wsfed.worker.columns import Columns, Texts, Unfit, allocate, check_memory, from_array

__all__ = ["LOADERS"]

#: Names of the column with the labels, the most telling first: in x, y, label it is the last.
_LABELS: Final = ("label", "labels", "target", "targets", "y")
#: How pandas calls the columns of its row numbers in a Parquet file.
_INDEX: Final = re.compile(r"__index_level_\d+__")


# --- arrays and tensors --------------------------------------------------------------------------


def _load_npz(path: Path) -> Columns:
    with path.open("rb") as file:  # numpy leaves a damaged file open that it opened itself
        if file.read(6) == b"\x93NUMPY":
            raise Unfit("it holds one array without a name; write it with numpy.savez")
        if not zipfile.is_zipfile(file):
            raise Unfit("it is no .npz file; write it with numpy.savez")
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            return {name: _from_archive(archive, name) for name in archive.files}


def _from_archive(archive: Any, name: str) -> torch.Tensor:
    try:
        values = archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise Unfit(
            f"field {name!r} holds Python objects, which are never unpickled; save plain arrays"
        ) from None
    if not isinstance(values, np.ndarray):
        raise Unfit(f"{name!r} in it is no array; write it with numpy.savez")
    return from_array(name, values)


def _load_safetensors(path: Path) -> Columns:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise Unfit("safetensors is not installed: pip install 'wsfed[safetensors]'") from None
    return dict(load_file(path))


def _load_pt(path: Path) -> Columns:
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:  # its text advises to load the file without this protection
        raise Unfit(
            "it holds more than tensors, or is no .pt file; torch.save a dictionary of tensors"
        ) from None
    if isinstance(value, torch.Tensor):
        return {"data": value}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict) and all(isinstance(each, torch.Tensor) for each in value.values()):
        return {str(name): each for name, each in value.items()}
    raise Unfit("it is no tensor, and no dictionary or list of nothing but tensors")


# --- tables --------------------------------------------------------------------------------------


def _load_csv(path: Path) -> Columns:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        return _read_table((reader.line_num, row) for row in reader if row)


def _read_table(lines: Iterator[tuple[int, list[str]]]) -> Columns:
    line, first = next(lines, (0, []))
    if not first:
        raise Unfit("it is empty")
    header = None if all(_number(cell) is not None for cell in first) else first
    if header is None and all(math.isnan(float(cell)) for cell in first):
        raise Unfit(f"line {line} is nothing but nan: no names, and no numbers")
    # Not lists of rows: those would take ten times the memory.
    values = array("d", () if header else _numbers(line, first, len(first)))
    for line, row in lines:
        values.extend(_numbers(line, row, len(first)))
    if not values:
        raise Unfit("it has a header and no rows")
    table = torch.frombuffer(values, dtype=torch.float64).view(-1, len(first))
    return _columns(table, header or ())


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _numbers(line: int, row: Sequence[str], width: int) -> list[float]:
    if len(row) != width:
        raise Unfit(f"line {line} has {len(row)} columns where the first has {width}")
    numbers = []
    for cell in row:
        number = _number(cell)
        if number is None:
            raise Unfit(
                f"line {line}: {cell[:40]!r} is no number; separate columns by commas, "
                "write nan for what is missing, and encode text as numbers"
            )
        numbers.append(number)
    return numbers


def _columns(table: torch.Tensor, header: Sequence[str]) -> Columns:
    names = [name.strip().lower() for name in header]
    place = next((names.index(name) for name in _LABELS if name in names), None)
    others = [column for column in range(table.shape[1]) if column != place]
    fields: Columns = {"features": table[:, others].to(torch.float32)} if others else {}
    if place is not None:
        labels = table[:, place]
        # Up to 2 ** 53 a float64 holds every whole number; this is false for nan and inf, too.
        whole = bool(((labels == labels.round()) & (labels.abs() <= 2**53)).all())
        fields["labels"] = labels.to(torch.int64 if whole else torch.float32)
    return fields


# --- Parquet -------------------------------------------------------------------------------------


def _load_parquet(path: Path) -> Columns:
    try:
        from pyarrow import parquet
    except ImportError:
        raise Unfit("pyarrow is not installed: pip install 'wsfed[data]'") from None
    with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
        groups = (file.metadata.row_group(index) for index in range(file.num_row_groups))
        check_memory(max(file.metadata.num_rows * 8, sum(each.total_byte_size for each in groups)))
        names = [name for name in file.schema_arrow.names if not _INDEX.fullmatch(name)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise Unfit(f"two of its columns are called {twice!r}; rename one")
        arrays = [_column_of(file, name) for name in names]
    single = [name for name, values in zip(names, arrays, strict=True) if values.ndim == 1]
    fields: Columns = {}
    fields |= {name: values for name, values in zip(names, arrays, strict=True) if values.ndim > 1}
    if single:
        columns = [values for values in arrays if values.ndim == 1]
        table = allocate((len(columns[0]), len(columns)), torch.float64)
        for index, values in enumerate(columns):
            table[:, index] = values
        for name, column in _columns(table, single).items():
            if name in fields:
                raise Unfit(
                    f"its column {name!r} has the name of the field that columns of single "
                    "numbers become; rename it"
                )
            fields[name] = column
    return fields


def _column_of(file: Any, name: str) -> torch.Tensor:
    """One column: ``[rows]`` of single numbers, ``[rows, …]`` of lists."""
    # One at a time: the whole table once more, in Arrow's form, would be twice the memory.
    table = file.read(columns=[name])
    if table.column_names != [name]:  # a dot in a name also means a part of a structure
        raise Unfit(f"its column {name!r} cannot be told from others; rename it")
    values = table.column(0).combine_chunks()
    shape = [len(values)]
    while _is_list(values.type):
        inner = _inner(name, values)
        shape.append(len(inner) // len(values) if len(values) else 0)
        values = inner
    return _plain(name, values, single=len(shape) == 1).reshape(shape)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _inner(name: str, lists: Any) -> Any:
    """What lists of equal lengths hold, one after the other."""
    import pyarrow.compute as pc

    if lists.null_count:
        raise Unfit(f"column {name!r}: a list in it is missing; fill it, or leave the row out")
    lengths = pc.min_max(pc.list_value_length(lists)).as_py()
    if lengths["min"] != lengths["max"]:
        raise Unfit(
            f"column {name!r} has lists of {lengths['min']} to {lengths['max']} numbers; "
            "make all of them of one length, or leave the column out"
        )
    return lists.flatten()


def _plain(name: str, values: Any, *, single: bool) -> torch.Tensor:
    import pyarrow as pa

    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise Unfit(
            f"column {name!r} is {str(kind)[:60]}, which is no number; encode it as numbers, or "
            "leave the column out"
        )
    if values.null_count:
        if single:
            values = values.cast(pa.float64())
        elif not pa.types.is_floating(kind):
            raise Unfit(
                f"column {name!r}: whole numbers in its lists are missing; fill them, or make them "
                "floating-point numbers, where nan stands for what is missing"
            )
    return from_array(name, values.to_numpy(zero_copy_only=False))


# --- text ----------------------------------------------------------------------------------------


def _load_txt(path: Path) -> Columns:
    try:
        with path.open(encoding="utf-8-sig") as file:
            rows = [line.rstrip("\n") for line in file if not line.isspace()]
    except UnicodeDecodeError as error:
        raise Unfit(f"it is no UTF-8 text ({error.reason}); convert it") from None
    return {"text": Texts(rows)}


#: The reader of a file by its suffix.
LOADERS: Final[Mapping[str, Callable[[Path], Columns]]] = MappingProxyType(
    {
        ".csv": _load_csv,
        ".npz": _load_npz,
        ".pt": _load_pt,
        ".safetensors": _load_safetensors,
        ".parquet": _load_parquet,
        ".txt": _load_txt,
    }
)
