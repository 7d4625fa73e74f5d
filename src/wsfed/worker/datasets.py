"""The owner's data: named files, loaded by the worker's owner and by nobody else.

================  =================================================================================
``.npz``          an array a field (no pickled objects)
``.safetensors``  a tensor a field
``.csv``          numbers, separated by commas; a header names the columns. The column called
                  ``label``, else ``target``, else ``y`` becomes the field ``labels`` (int64 where
                  all are whole numbers, else float32), the others ``features`` (float32)
``.parquet``      columns of single numbers as in ``.csv``; a column of lists of one length is a
                  field of its own
``.pt``           a dictionary of tensors, a list of them (fields ``"0"``, ``"1"``, …), or one
                  tensor (field ``"data"``); loaded with ``weights_only``
``.txt``          a document a line (UTF-8; blank lines are left out): the field ``text``, which the
                  transform ``tokenise`` makes ``tokens`` and ``lengths``
a folder          images (``.png .jpg .jpeg .bmp .gif``) in a sub-folder for each class: ``images``
                  (uint8 ``[rows, channels, height, width]``) and ``labels`` (int64, the place of
                  the sub-folder's name among all)
a function        of the owner's (:mod:`wsfed.worker.providers`)
================  =================================================================================

All fields have the same number of rows. What is loaded is the worker's own copy: changing the file
afterwards changes nothing, and neither does what a client writes into a batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import torch

from wsfed.errors import DatasetError
from wsfed.tensors import DTYPE_NAMES
from wsfed.worker.columns import Columns, Unfit, tensor_of
from wsfed.worker.formats import LOADERS
from wsfed.worker.images import load_folder
from wsfed.worker.providers import Provider, columns_of
from wsfed.worker.transforms import Transform, transformed

__all__ = ["Dataset", "load", "parse_option", "parse_split"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_Fields: TypeAlias = dict[str, torch.Tensor]
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

    def sample(
        self,
        rate: float,
        size: int,
        generator: np.random.Generator,
        fields: Sequence[str] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """A batch by Poisson sampling: each row is taken with probability ``rate``, by itself.

        A batch has ``size`` rows all the same: the rows that were taken, over and over; of more
        than ``size``, so many of them. Where none was taken, the first row stands for all.

        Args:
            rate: above 0, at most 1.
            size: rows of the batch, at most all rows.
            generator: what is drawn from.
            fields: names, ``None`` for all of them in their order.

        Returns:
            A tensor for each field, and a last one (float32, shape ``[size]``): 1 for rows that
            were taken, each once, and 0 for those that fill up.

        Raises:
            IndexError: there are not so many rows.
            KeyError: there is no such field.
        """
        if not 0 < size <= self.rows:
            raise IndexError(f"{self.rows} rows make no batch of {size}")
        taken = np.flatnonzero(generator.random(self.rows) < rate)
        if len(taken) > size:
            taken = generator.choice(taken, size, replace=False)
        chosen = torch.from_numpy(np.resize(taken if len(taken) else np.zeros(1, np.int64), size))
        made = [
            tensor.detach().index_select(0, chosen.to(tensor.device))
            for tensor in self._chosen(fields)
        ]
        weights = torch.zeros(size)
        weights[: len(taken)] = 1.0
        device = made[0].device if made else weights.device
        return (*made, weights.to(device))

    def split(self, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Rows to train with, and rows to validate with, which are called ``<name>-validation``.

        No row is in both, each is in one, and they keep their order. The same fraction and seed
        choose the same rows. With a field ``labels`` of one int64 a row each class has its share of
        the validation rows, to a row.

        Args:
            fraction: of the rows, for validation; above 0 and below 1.
            seed: what it is drawn with.

        Raises:
            DatasetError: one of the two would have no rows.
        """
        if not 0 < fraction < 1:
            raise DatasetError(self.name, f"a fraction to split off is between 0 and 1: {fraction}")
        share = Fraction(str(float(fraction)))  # 0.2 is a fifth, which no binary number is
        count = round(self.rows * share)
        if not 0 < count < self.rows:
            raise DatasetError(
                self.name,
                f"{fraction} of {self.rows} rows leaves no row to "
                f"{'train' if count else 'validate'} with; give another fraction",
            )
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        labels = self.fields.get("labels")
        if labels is not None and labels.dtype is torch.int64 and labels.ndim == 1:
            chosen = _stratified(labels.detach().cpu(), order, share, count)
        else:
            chosen = order[:count]
        validation = torch.zeros(self.rows, dtype=torch.bool).index_fill_(0, chosen, True)
        return (
            self._part(self.name, ~validation),
            self._part(f"{self.name}-validation", validation),
        )

    def _part(self, name: str, chosen: torch.Tensor) -> Dataset:
        fields = {
            each: tensor.detach()[chosen.to(tensor.device)] for each, tensor in self.fields.items()
        }
        return Dataset(name, fields, self.open)

    def _order_of(self, seed: int) -> torch.Tensor:
        # Read once: another session's thread may put its order in at any time.
        for known, order in tuple(self._orders):
            if known == seed:
                return order
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        self._orders[:] = [(seed, order), *self._orders[: _ORDERS - 1]]
        return order


def _stratified(
    labels: torch.Tensor, order: torch.Tensor, share: Fraction, count: int
) -> torch.Tensor:
    """``count`` places, of each class its share of them, the first of the class in that order.

    Shares are rounded by largest remainders; of equal ones the class that comes first in ``order``.
    """
    # Rows by class, in their order: the sort is stable.
    classes = labels[order]
    by_class = order[torch.sort(classes, stable=True).indices]
    sizes: list[int] = torch.unique(labels, return_counts=True)[1].tolist()
    quotas = [size * share for size in sizes]
    whole = [int(quota) for quota in quotas]
    groups = torch.split(by_class, sizes)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    heads: list[int] = place[torch.stack([group[0] for group in groups])].tolist()
    by_rest = sorted(range(len(sizes)), key=lambda each: (whole[each] - quotas[each], heads[each]))
    for each in by_rest[: count - sum(whole)]:
        whole[each] += 1
    return torch.cat([group[:size] for group, size in zip(groups, whole, strict=True)])


def parse_option(text: str) -> tuple[str, Path | Provider]:
    """``"scans=/data/scans.npz"`` or ``"scans=python:clinic:scans"`` → name, and path or provider.

    Raises:
        ValueError: not of that form.
    """
    name, separator, path = text.partition("=")
    if not separator or not path or not _NAME.fullmatch(name):
        raise ValueError(f"{text!r} is not NAME=PATH, such as digits=digits.npz")
    if path.startswith("python:"):
        return name, Provider.parse(path)
    return name, Path(path).expanduser()


def parse_split(text: str) -> tuple[str, float, int]:
    """``"scans=0.2,seed=7"`` → name, fraction and seed (0 where none is given).

    Raises:
        DatasetError: not of that form.
    """
    name, _, given = text.partition("=")
    share, comma, seed = given.partition(",seed=")
    try:
        fraction, number = float(share), int(seed) if comma else 0
    except ValueError:
        fraction, number = 0.0, 0
    if not _NAME.fullmatch(name) or not 0 < fraction < 1 or not 0 <= number < 2**63:
        raise DatasetError(
            text,
            "this is not NAME=FRACTION or NAME=FRACTION,seed=SEED with a fraction between 0 and 1, "
            "such as digits=0.2,seed=7",
        )
    return name, fraction, number


def load(
    name: str,
    path: str | Path | Provider,
    *,
    transforms: Sequence[tuple[str, Transform]] = (),
    open: bool = False,
    device: str | torch.device = "cpu",
) -> Dataset:
    """Load a data set.

    Args:
        name: what clients ask for.
        path: of a file, whose suffix tells the format, or of a folder of images; or the owner's
            function.
        transforms: a field's name and what is done to it, one after the other
            (:mod:`wsfed.worker.transforms`).
        open: whether rows may be fetched.
        device: where it is kept.

    Raises:
        DatasetError: the file is missing, malformed, or unfit; the text says what to do.
    """
    source = path if isinstance(path, Provider) else Path(path)
    try:
        columns = transformed(_read(source), transforms)
        return Dataset(name, _place(columns, device), open)
    except FileNotFoundError:
        raise DatasetError(str(path), "there is no such file") from None
    except OSError as error:
        raise DatasetError(str(path), error.strerror or str(error)) from None
    except MemoryError:
        raise DatasetError(str(path), "it does not fit into this machine's memory") from None
    except Unfit as error:
        raise DatasetError(str(path), str(error)) from error.__cause__
    except DatasetError as error:
        raise DatasetError(str(path), error.reason) from None
    except Exception as error:  # what the formats' readers raise for damaged bytes has no end
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        form = "cannot be used" if isinstance(source, Provider) else f"no {source.suffix} file"
        raise DatasetError(str(path), f"it is damaged, or {form} ({reason})") from None


def _read(source: Path | Provider) -> Columns:
    if isinstance(source, Provider):
        rows = source()
        return dict(rows.fields) if isinstance(rows, Dataset) else columns_of(rows)
    if source.is_dir():
        return load_folder(source)
    suffix = source.suffix.lower()
    if suffix not in LOADERS:
        known = " ".join(LOADERS)
        raise Unfit(f"its suffix {source.suffix!r} is not one of {known}, and it is no folder")
    return LOADERS[suffix](source)


def _place(columns: Columns, device: str | torch.device) -> _Fields:
    """Copies of the worker's own: no field shares memory with another, or with the file."""
    fields: _Fields = {}
    for name in list(columns):
        try:
            value = tensor_of(columns.pop(name))  # so that the original goes when the copy is there
        except Unfit as error:
            raise Unfit(f"field {name!r}: {error}") from None
        fields[name] = (_copy(value) if value.layout is torch.strided else value).to(device)
    return fields


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, in memory of torch's own, outside autograd."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
