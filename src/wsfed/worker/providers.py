"""Python functions of the owner's that give rows: ``python:module:function``.

The owner names them on the worker's command line; no client can. Importing the module runs it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from wsfed.worker.columns import Columns, Unfit, allocate, from_array

__all__ = ["Provider", "columns_of"]

_FORM: Final = re.compile(r"python:([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")


@dataclass(frozen=True, slots=True)
class Provider:
    """A function without arguments that gives the rows.

    Attributes:
        module: it is imported when the rows are loaded.
        function: its name in there.
    """

    module: str
    function: str

    @classmethod
    def parse(cls, text: str) -> Provider:
        """``"python:clinic.rows:scans"`` → module ``clinic.rows``, function ``scans``.

        Raises:
            ValueError: not of that form.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not python:MODULE:FUNCTION, such as python:clinic:scans")
        return cls(match[1], match[2])

    def __str__(self) -> str:
        return f"python:{self.module}:{self.function}"

    def __call__(self) -> object:
        """Import the module, and call the function.

        Raises:
            Unfit: there is no such module or function, or it raised.
        """
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{self.module}.".startswith(f"{error.name}."):
                raise Unfit(f"the module needs {error.name!r}, which is not installed") from error
            raise Unfit(
                f"there is no module {self.module!r} installed or in the folder that the worker "
                "was started in"
            ) from None
        except Exception as error:
            raise Unfit(f"importing it raised {_told(error)}") from error
        function = getattr(module, self.function, None)
        if not callable(function):
            raise Unfit(f"module {self.module!r} has no function {self.function!r}")
        try:
            return function()
        except MemoryError:
            raise
        except Exception as error:
            raise Unfit(f"it raised {_told(error)}") from error


def _told(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def columns_of(rows: object) -> Columns:
    """The columns of what a provider gave.

    Args:
        rows: tensors or arrays by name, or a ``torch.utils.data.Dataset`` with a length: its rows
            are tuples (fields ``"0"``, ``"1"``, …), dictionaries, or single tensors (field
            ``"data"``), and each has the shapes and dtypes of the first.

    Raises:
        Unfit: it is neither, or its rows differ.
    """
    if isinstance(rows, Mapping):
        return {str(name): _tensor(f"field {name!r}", value) for name, value in rows.items()}
    if isinstance(rows, torch.utils.data.Dataset) and hasattr(rows, "__getitem__"):
        if not isinstance(rows, Sized):
            raise Unfit(f"it gave a {type(rows).__name__} without a length; give it __len__")
        return _stack(rows)
    raise Unfit(
        f"it gave a {type(rows).__name__}; give a wsfed.Dataset, a dictionary of tensors or "
        "arrays, or a torch.utils.data.Dataset with a length"
    )


def _stack(rows: Any) -> Columns:
    count = len(rows)
    if not count:
        raise Unfit("it has no rows")
    first = _row(rows, 0)
    columns = {name: allocate((count, *value.shape), value.dtype) for name, value in first.items()}
    for index in range(count):
        row = _row(rows, index) if index else first
        if row.keys() != columns.keys():
            raise Unfit(f"row {index} has fields {', '.join(row)}; row 0 has {', '.join(columns)}")
        for name, value in row.items():
            if value.layout is not torch.strided:
                raise Unfit(f"row {index}, field {name!r} is sparse; make it dense")
            if (value.shape, value.dtype) != (first[name].shape, first[name].dtype):
                raise Unfit(
                    f"row {index}, field {name!r} is {_shown(value)}, and in row 0 "
                    f"{_shown(first[name])}; give all rows one shape and dtype"
                )
            columns[name][index] = value
    return dict(columns)


def _row(rows: Any, index: int) -> dict[str, torch.Tensor]:
    try:
        row = rows[index]
    except MemoryError:
        raise
    except Exception as error:
        raise Unfit(f"row {index} raised {_told(error)}") from error
    match row:
        case Mapping():
            named = {str(name): value for name, value in row.items()}
        case tuple() | list():
            named = {str(place): value for place, value in enumerate(row)}
        case _:
            named = {"data": row}
    return {name: _tensor(f"row {index}, field {name!r}", each) for name, each in named.items()}


def _tensor(place: str, value: object) -> torch.Tensor:
    match value:
        case torch.Tensor():
            return value.detach()
        case np.ndarray() | np.generic():
            try:
                return from_array("", np.asarray(value))
            except Unfit:
                raise Unfit(f"{place} is an array of {value.dtype}; make it numbers") from None
        case int() if not -(2**63) <= value < 2**63:
            raise Unfit(f"{place} is a number too large for int64")
        case bool() | int() | float():
            return torch.tensor(value)
        case _:
            raise Unfit(f"{place} is a {type(value).__name__}; make it a tensor or an array")


def _shown(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
