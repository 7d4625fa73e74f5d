"""A worker that lets nothing leave but releases: changes of a model, clipped and with noise.

A session that has touched rows of a private data set is closed from then on: whatever it computes
stays, whether it holds rows or not. Two kinds of tensors can still be fetched. What a client has
sent *sealed*, because the worker keeps a copy that no operation reaches; and what comes of a
:class:`~wsfed.protocol.messages.Release`: a sealed model plus the difference to trained values,
brought to the owner's norm, plus Gaussian noise from the machine's entropy. Each release counts
against the data sets that the session has touched.

Numbers that a run reports are not a number, shapes and tags are not told, and a command that fails
ends releases, because whether it failed may depend on rows: one bit is all that a session tells.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wsfed.errors import BudgetSpent, GetNotPermitted, RemoteError
from wsfed.privacy.mechanism import Mechanism, epsilon_of
from wsfed.privacy.noise import unforeseeable

__all__ = ["Ledger", "Releases", "Vault", "parse_releases"]


@dataclass(frozen=True, slots=True)
class Releases(Mechanism):
    """What the owner lets leave.

    Attributes:
        clip: L2 norm of a change, at most.
        noise: standard deviation of the noise, at least, in units of the clipping norm.
        delta: of the guarantee.
        budget: epsilon of a data set after which nothing leaves any more; ``None`` for no end.
    """


def parse_releases(text: str) -> Releases:
    """``"clip=1,noise=1,budget=8"`` → rules.

    Raises:
        ValueError: not of that form, or out of range.
    """
    given: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in ("clip", "noise", "delta", "budget") or name in given:
            raise ValueError(f"{text!r} is not clip=NORM,noise=FACTOR[,delta=…][,budget=…]")
        try:
            given[name] = float(number)
        except ValueError:
            raise ValueError(f"{text!r}: {number!r} is no number") from None
    return Releases(**given)


class Ledger:
    """How often each data set was released with how much noise, for all sessions of a worker.

    Args:
        rules: of the owner.
        path: of a file, which is made if it is not there; ``None`` to forget with the process.

    Raises:
        ImportError: there is a budget, and opacus is not installed.
        ValueError: the file is no ledger.
        OSError: it cannot be read.
    """

    def __init__(self, rules: Releases, path: str | Path | None = None) -> None:
        self.rules = rules
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._counts: dict[str, dict[float, int]] = {}
        if rules.budget is not None:
            import opacus.accountants  # noqa: F401  not found out only when somebody asks
        if self._path is not None and self._path.exists():
            try:
                told = json.loads(self._path.read_text())
                self._counts = {
                    str(name): {float(noise): int(count) for noise, count in each}
                    for name, each in told.items()
                }
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is no ledger: {error}") from None

    def epsilon(self, name: str) -> float:
        """Spent of a data set so far (Rényi accounting of the Gaussian mechanism)."""
        with self._lock:
            return self._epsilon(self._counts.get(name, {}))

    def _epsilon(self, counts: dict[float, int]) -> float:
        return epsilon_of(
            [(noise, 1.0, count) for noise, count in counts.items()], self.rules.delta
        )

    def spend(self, names: Sequence[str], noise: float) -> None:
        """Account for a release; returns when it is on the disk.

        Raises:
            BudgetSpent: it would exceed the budget of a data set. Nothing is spent.
            OSError: it cannot be written.
        """
        with self._lock:
            after = {name: dict(self._counts.get(name, {})) for name in names}
            for name, counts in after.items():
                counts[noise] = counts.get(noise, 0) + 1
                if self.rules.budget is not None and self._epsilon(counts) > self.rules.budget:
                    raise BudgetSpent(
                        f"the privacy budget of the data set {name!r} is spent: epsilon "
                        f"{self.rules.budget:g} at delta {self.rules.delta:g}",
                        op="release",
                    )
            self._write({**self._counts, **after})
            self._counts |= after

    def _write(self, counts: dict[str, dict[float, int]]) -> None:
        if self._path is None:
            return
        partial = self._path.with_name(self._path.name + ".partial")
        with partial.open("w") as file:
            json.dump({name: list(each.items()) for name, each in counts.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)


class Vault:
    """The rules of one session.

    Args:
        ledger: of the worker; ``None`` where results may leave.
    """

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger
        self._touched: set[str] = set()
        self._sealed: dict[int, torch.Tensor] = {}
        self._has_failed = False
        self._generator = unforeseeable()

    @property
    def is_strict(self) -> bool:
        """Whether nothing leaves but releases."""
        return self._ledger is not None

    @property
    def is_closed(self) -> bool:
        """Whether the session has touched private rows, where that closes it."""
        return self._ledger is not None and bool(self._touched)

    def touch(self, name: str) -> None:
        """The session is given rows of a private data set."""
        self._touched.add(name)

    def failed(self) -> None:
        """A command failed; the client is told."""
        self._has_failed |= self.is_closed

    # --- sealed tensors ---

    @property
    def nbytes(self) -> int:
        """Memory of the copies."""
        return sum(tensor.nbytes for tensor in self._sealed.values())

    def seal(self, id: int, tensor: torch.Tensor) -> None:
        """Keep a copy that no operation reaches."""
        self._sealed[id] = tensor.detach().clone()

    def forget(self, ids: Sequence[int]) -> None:
        """These objects are deleted."""
        if self._sealed:
            for id in ids:
                self._sealed.pop(id, None)

    def sealed(self, id: int) -> torch.Tensor | None:
        """What may be fetched under ``id`` from a closed session; ``None`` for an open one.

        Raises:
            GetNotPermitted: nothing may.
        """
        if not self.is_closed:
            return None
        if id not in self._sealed:
            raise GetNotPermitted(
                "of what is computed beside private rows the owner lets nothing leave but changes "
                "of a model, with noise",
                op="get",
            )
        return self._sealed[id]

    def check_open(self, what: str) -> None:
        """Whether a session may do what tells more of its objects.

        Raises:
            GetNotPermitted: it has touched private rows.
        """
        if self.is_closed:
            raise GetNotPermitted(
                "the owner lets nothing be told of what was computed beside private rows", op=what
            )

    # --- releases ---

    def release(
        self, values: Sequence[torch.Tensor], given: Sequence[int], clip: float, noise: float
    ) -> list[torch.Tensor]:
        """What of trained values may leave: ``given + clipped(values - given) + N(0, s ** 2)``.

        The norm is over all fractional tensors together, and ``s = noise * clip`` (the Gaussian
        mechanism; McMahan et al. 2018, *Learning differentially private recurrent language
        models*). What is no fractional number is as it was given; so is all of it, but for the
        noise, if the change is not finite.

        Args:
            values: trained.
            given: identifiers of what they were before, sealed.
            clip: norm of the change.
            noise: in units of ``clip``.

        Raises:
            GetNotPermitted: weaker than the owner's rules, the budget is spent, what was given is
                not sealed, or a command failed before.
            RemoteError: this worker releases nothing, or shapes do not fit.
        """
        if self._ledger is None:
            raise RemoteError("this worker has no rules for releases: its results may be fetched")
        rules = self._ledger.rules
        if not (0 < clip <= rules.clip and rules.noise <= noise < math.inf):
            raise GetNotPermitted(
                f"a release with clip={clip:g} and noise={noise:g} is weaker than the owner's "
                f"clip={rules.clip:g} and noise={rules.noise:g}",
                op="release",
            )
        if self._has_failed:
            raise GetNotPermitted(
                "a command of this session failed, which may tell of rows; connect again",
                op="release",
            )
        if any(id not in self._sealed for id in given):
            raise GetNotPermitted("what was given has to be sealed when it is sent", op="release")
        before = [self._sealed[id] for id in given]
        kinds = [(value.shape, value.dtype) for value in values]
        if kinds != [(each.shape, each.dtype) for each in before]:
            raise RemoteError("values and what was given are not of the same shapes and dtypes")
        self._ledger.spend(sorted(self._touched), noise)
        return self._noisy(values, before, clip, noise * clip)

    def _noisy(
        self,
        values: Sequence[torch.Tensor],
        before: Sequence[torch.Tensor],
        clip: float,
        deviation: float,
    ) -> list[torch.Tensor]:
        with torch.no_grad():
            changes = [
                value.detach().double() - given.double() if given.is_floating_point() else None
                for value, given in zip(values, before, strict=True)
            ]
            squares = [float(each.square().sum()) for each in changes if each is not None]
            norm = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf
            factor = 0.0 if norm == math.inf else min(1.0, clip / max(norm, 1e-30))
            made = []
            for change, given in zip(changes, before, strict=True):
                if change is None:
                    made.append(given.clone())
                    continue
                moved = change * factor if factor else torch.zeros_like(change)
                drawn = torch.as_tensor(self._generator.normal(0.0, deviation, given.shape))
                made.append((given.double() + moved + drawn.to(given.device)).to(given.dtype))
            return made
