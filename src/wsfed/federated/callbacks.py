"""What programs are told while training goes on, and how they end it."""

from __future__ import annotations

import math
from collections.abc import Awaitable
from typing import Any

from wsfed.federated.history import History, Round

__all__ = ["Callback", "EarlyStopping"]


class Callback:
    """Told of what happens. Override what is of interest.

    All of them run in the event loop, so they must not block it.
    """

    def round_begins(self, number: int, sites: list[str]) -> None:
        """A round begins.

        Args:
            number: from 1.
            sites: that take part.
        """

    def batch_done(self, site: str, progress: Any) -> None:
        """A site has finished a batch.

        Args:
            site: who.
            progress: a :class:`wsfed.Progress`; its value is the loss.
        """

    def round_ends(self, round: Round, history: History) -> str | Awaitable[str | None] | None:
        """A round has ended. What takes long is awaited: this may be a coroutine function.

        Args:
            round: this one.
            history: with this one.

        Returns:
            Why training is to end now, or ``None`` to go on.
        """


class EarlyStopping(Callback):
    """Ends training when a number has not got better for some rounds.

    Args:
        name: of the number: ``"loss"`` or a metric.
        patience: rounds without a better one.
        better: ``"lower"`` or ``"higher"``.
        by: what counts as better, at least.

    Raises:
        ValueError: ``better`` is neither, or ``patience`` is not positive.
    """

    def __init__(
        self, name: str = "loss", *, patience: int = 5, better: str = "lower", by: float = 0.0
    ) -> None:
        if better not in ("lower", "higher") or patience < 1 or not by >= 0:
            raise ValueError(
                f"better is 'lower' or 'higher', patience at least 1, by not negative: "
                f"{better=}, {patience=}, {by=}"
            )
        self._name, self._patience, self._by = name, patience, by
        self._sign = 1.0 if better == "lower" else -1.0

    def round_ends(self, round: Round, history: History) -> str | None:
        """Looks at all rounds so far, so it goes on where a training is resumed.

        Raises:
            KeyError: a round was evaluated, and there is no such number.
        """
        best, since = math.inf, 0
        for value in self._values(history):
            if self._sign * value < best - (self._by if best < math.inf else 0):
                best, since = self._sign * value, 0
            else:
                since += 1
        if since < self._patience:
            return None
        return f"{self._name} has not got better for {since} rounds"

    def _values(self, history: History) -> list[float]:
        """The number of each round that has it."""
        if self._name == "loss":
            return history.series("loss")
        evaluated = [each.metrics for each in history if each.metrics]
        for metrics in evaluated:
            if self._name not in metrics:
                raise KeyError(f"there is no {self._name!r}; there is loss, {', '.join(metrics)}")
        return [metrics[self._name] for metrics in evaluated]
