"""A data set that a worker's owner offers: its rows stay there, its batches are pointers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wsfed.client.runs import Batches, DatasetRun, begin
from wsfed.errors import NotFound
from wsfed.pointers.plan import Plan
from wsfed.pointers.pointer import Pointer, make_pointer
from wsfed.pointers.site import capture_site
from wsfed.protocol import messages as m
from wsfed.tensors import DTYPES

__all__ = ["Loader", "RemoteDataset", "capacity"]


@dataclass(frozen=True, slots=True)
class Field:
    """Dtype and shape of one field; the first size is the number of rows."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class RemoteDataset:
    """A named data set on a worker; made by ``await worker.dataset(name)``.

    Attributes:
        name: as the owner calls it.
        rows: how many there are.
        open: whether the owner lets rows be fetched.
        fields: dtype and shape by name, in the order in which batches give them.
    """

    def __init__(self, link: Any, described: Mapping[str, Any]) -> None:
        self._link = link
        self.name: str = described["name"]
        self.rows: int = described["rows"]
        self.open: bool = described["open"]
        self.fields: dict[str, Field] = {
            name: Field(DTYPES[dtype], tuple(shape)) for name, dtype, shape in described["fields"]
        }

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}: {field.dtype}" for name, field in self.fields.items())
        where = self._link.worker.id
        return f"<RemoteDataset {self.name!r} on {where!r}: {self.rows} rows of {fields}>"

    def __getitem__(self, field: str) -> Pointer:
        """All rows of one field, as a pointer.

        Raises:
            NotFound: there is no such field.
        """
        return self.batch(max(self.rows, 1), 0, fields=[field])[0]

    def _field(self, name: str) -> Field:
        if name not in self.fields:
            known = ", ".join(map(repr, self.fields))
            raise NotFound(f"the data set {self.name!r} has no field {name!r}; it has {known}")
        return self.fields[name]

    def batch(
        self,
        batch_size: int,
        index: int,
        *,
        seed: int | None = None,
        fields: Sequence[str] | None = None,
    ) -> tuple[Pointer, ...]:
        """One batch, a pointer for each field; made on the worker.

        Args:
            batch_size: rows of a full batch.
            index: which batch, from 0; the last one may be smaller.
            seed: order of the rows: ``None`` for their own, else that of
                ``torch.randperm(rows, generator=torch.Generator().manual_seed(seed))``.
            fields: names of those that are wanted; by default all, in their order.

        Raises:
            ValueError: a batch of less than one row.
            IndexError: there is no such batch.
            NotFound: there is no such field.
        """
        _check_size(batch_size)
        start = index * batch_size
        if not 0 <= start < max(self.rows, 1):
            raise IndexError(f"{self.rows} rows have no batch {index} of {batch_size}")
        size = min(batch_size, self.rows - start)
        wanted = {name: self._field(name) for name in (self.fields if fields is None else fields)}
        ids = [self._link.new_id() for _ in wanted]
        command = m.Batch(self.name, list(wanted), ids, seed, batch_size, index)
        self._link.issue(command.wire(), capture_site())
        return tuple(
            make_pointer(self._link, id, (size, *field.shape[1:]), field.dtype)
            for id, field in zip(ids, wanted.values(), strict=True)
        )

    def run(
        self,
        plan: Plan[..., Any],
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        sample_rate: float | None = None,
        steps: int | None = None,
        fields: Sequence[str] | None = None,
        until: Callable[[Any], Any] | None = None,
    ) -> DatasetRun:
        """Run a plan over the rows, on the worker: one message for all epochs. Does not wait.

        The same as, with the same bits, but that nothing is asked for in between::

            loader = dataset.loader(batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
            for _ in range(epochs):
                for batch in loader:
                    results.append(plan(*batch))

        With ``sample_rate`` and ``steps`` batches come by Poisson sampling instead: each row is
        taken with that probability, by itself, which nobody but the worker can foresee. A plan has
        fixed shapes, so each batch has :func:`capacity` rows and the plan is given one tensor
        more, the weights (float32, one a row): 1 for rows that were taken and 0 for those that
        only fill up.

        Args:
            plan: made by :func:`wsfed.plan`; it is given the fields of a batch, and gives numbers
                (tensors of one element), or collections of them.
            batch_size: rows of a full batch.
            epochs: how often all rows are gone through.
            shuffle: a new order each epoch: that of the seed ``seed + epoch``.
            seed: see ``shuffle``.
            drop_last: leave out a last batch that is not full.
            sample_rate: probability of a row, in place of ``batch_size`` and ``epochs``.
            steps: batches, with ``sample_rate``.
            fields: names of those that are given, in order; by default all.
            until: of the plan's result: a tensor of one element. The run ends when it is true.

        Raises:
            TypeError: what is to be run is no plan.
            ValueError: no epoch, no batch, a batch of less than one row, or settings that do not go
                together.
            NotFound: there is no such field.
            PlanError: the function cannot be recorded, or gives something else than numbers.
        """
        if not isinstance(plan, Plan):
            raise TypeError(f"a {type(plan).__name__} is no plan: decorate it with @wsfed.plan")
        if sample_rate is not None or steps is not None:
            if batch_size is not None or epochs != 1 or shuffle or drop_last:
                raise ValueError("sample_rate and steps take the place of batch_size and epochs")
            batches = self._sampled(sample_rate, steps)
        elif batch_size is None:
            raise ValueError("give a batch_size, or a sample_rate and steps")
        else:
            batches = self._batches(batch_size, epochs, seed if shuffle else None, drop_last)
        wanted = {name: self._field(name) for name in (self.fields if fields is None else fields)}

        def make(rows: int) -> list[Pointer]:
            shapes = [((rows, *field.shape[1:]), field.dtype) for field in wanted.values()]
            if batches.rate is not None:
                shapes.append(((rows,), torch.float32))
            return [make_pointer(self._link, self._link.new_id(), *shape) for shape in shapes]

        def bring(pointers: list[Pointer]) -> None:
            ids = [each._handle.id for each in pointers[: len(wanted)]]
            command = m.Batch(self.name, list(wanted), ids, batches.seed, batches.batch_size, 0)
            self._link.issue(command.wire(), capture_site())
            for weights in pointers[len(wanted) :]:
                self._link.store(weights._handle.id, torch.ones(weights.shape), False)

        with plan.lock:
            return begin(self._link, self.name, list(wanted), plan, make, bring, batches, until)

    def _batches(self, batch_size: int, epochs: int, seed: int | None, drop_last: bool) -> Batches:
        _check_size(batch_size)
        if epochs < 1:
            raise ValueError(f"epochs has to be at least one, not {epochs}")
        whole, rest = divmod(self.rows, batch_size)
        sizes = [batch_size] * whole + ([rest] if rest and not drop_last else [])
        if not sizes:
            raise ValueError(f"{self.rows} rows make no batch of {batch_size}")
        return Batches(epochs, batch_size, seed, sizes)

    def _sampled(self, rate: float | None, steps: int | None) -> Batches:
        if rate is None or steps is None or not 0 < rate <= 1 or steps < 1:
            raise ValueError(f"a rate above 0, at most 1, and steps: {rate=}, {steps=}")
        size = capacity(self.rows, rate)
        return Batches(1, size, None, [size] * steps, float(rate))

    def loader(
        self, batch_size: int, *, shuffle: bool = False, seed: int = 0, drop_last: bool = False
    ) -> Loader:
        """Batches of an epoch, over and over, as ``torch.utils.data.DataLoader`` gives them.

        Args:
            batch_size: rows a batch.
            shuffle: a new order each epoch: that of the seed ``seed + epoch``.
            seed: see ``shuffle``.
            drop_last: leave out a last batch that is not full.

        Raises:
            ValueError: a batch of less than one row.
        """
        _check_size(batch_size)
        return Loader(self, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)


def capacity(rows: int, rate: float) -> int:
    """Rows of a batch by Poisson sampling, which hold what is taken in all but one case in 10^9.

    The mean and seven standard deviations of the binomial distribution and twenty rows.
    """
    mean = rows * rate
    return min(rows, math.ceil(mean + 7 * math.sqrt(mean * (1 - rate)) + 20))


def _check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size has to be at least one row, not {batch_size}")


class Loader:
    """Gives the batches of one epoch each time it is iterated.

    Attributes:
        epoch: how many epochs were begun; set it to repeat or to skip some.
    """

    def __init__(
        self, dataset: RemoteDataset, batch_size: int, *, shuffle: bool, seed: int, drop_last: bool
    ) -> None:
        self._dataset, self._batch_size = dataset, batch_size
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(self._dataset.rows, self._batch_size)
        return whole + (1 if rest and not self._drop_last else 0)

    def __iter__(self) -> Iterator[tuple[Pointer, ...]]:
        seed = self._seed + self.epoch if self._shuffle else None
        self.epoch += 1
        for index in range(len(self)):
            yield self._dataset.batch(self._batch_size, index, seed=seed)
