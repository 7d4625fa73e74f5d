"""What robust strategies have in common: every reply is held, and compared entry by entry."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence

import torch

from wsfed.federated.strategies.strategy import Memory, Reply, State, Strategy

__all__ = [
    "RobustStrategy",
    "by_coordinate",
    "check_byzantine",
    "measured",
    "squared_distances",
    "stack",
]


class RobustStrategy(Strategy):
    """A strategy for sites of which some may report anything: it looks at all replies together."""

    tolerates_garbage = True

    @abstractmethod
    def combine(self, state: State, replies: Sequence[Reply]) -> State:
        """The next model.

        Args:
            state: the model that the sites were given.
            replies: at least ``min_replies``, all of the names, shapes and dtypes of ``state``.
        """

    def aggregate(
        self,
        state: State,
        memory: Memory,
        replies: Sequence[Reply],
        buffers: Collection[str] = (),
    ) -> tuple[State, Memory]:
        """The next model; buffers are dealt with as what is trained.

        Raises:
            ValueError: there are fewer replies than ``min_replies``, none that can be used, or one
                does not fit the model.
        """
        _check_replies(self, state, replies)
        return self.combine(state, replies), memory


def check_byzantine(count: int) -> None:
    """Refuse what is no number of sites.

    Raises:
        ValueError: it is negative or not an integer.
    """
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"byzantine has to be an integer that is not negative: {count}")


def _check_replies(strategy: Strategy, state: State, replies: Sequence[Reply]) -> None:
    """Refuse replies that the strategy cannot work with.

    Raises:
        ValueError: there are fewer than ``min_replies``, or one is not of the names, shapes and
            dtypes of the model.
    """
    if len(replies) < strategy.min_replies:
        raise ValueError(
            f"{strategy.name} needs at least {strategy.min_replies} replies, not {len(replies)}"
        )
    for reply in replies:
        if odd := sorted(set(reply.state) ^ set(state)):
            raise ValueError(f"{reply.site} and the model differ in {', '.join(odd)}")
        for name, known in state.items():
            value = reply.state[name]
            if value.shape != known.shape or value.dtype != known.dtype:
                raise ValueError(
                    f"{reply.site}: {name} is {value.dtype}{list(value.shape)}, "
                    f"not {known.dtype}{list(known.shape)}"
                )


def stack(replies: Sequence[Reply], name: str) -> torch.Tensor:
    """One entry of all replies.

    Returns:
        float64 ``[replies, coordinates]``; a complex number is two coordinates.
    """
    return torch.stack([_coordinates(reply.state[name]) for reply in replies])


def _coordinates(value: torch.Tensor) -> torch.Tensor:
    if value.is_complex():
        value = torch.view_as_real(value.detach().to(torch.complex128).resolve_conj())
    return value.detach().double().flatten()


def _entry(coordinates: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The opposite of ``_coordinates``; integers are rounded to the nearest."""
    if like.is_complex():
        pairs = coordinates.reshape(*like.shape, 2).contiguous()
        return torch.view_as_complex(pairs).to(like.dtype)
    if not like.is_floating_point():
        coordinates = coordinates.round()
    return coordinates.reshape(like.shape).to(like.dtype)


def by_coordinate(
    state: State, replies: Sequence[Reply], middle: Callable[[torch.Tensor], torch.Tensor]
) -> State:
    """The model whose every coordinate is a function of the replies' sorted values of it.

    Args:
        state: says which entries there are, and of what dtypes.
        replies: at least one.
        middle: from ``[replies, coordinates]``, sorted along the replies with NaN as the largest,
            to ``[coordinates]``.
    """
    return {
        name: _entry(middle(stack(replies, name).sort(dim=0).values), value)
        for name, value in state.items()
    }


def measured(state: State) -> list[str]:
    """Names of the entries that distances are over: not integers or flags, which only count."""
    return [name for name, each in state.items() if each.is_floating_point() or each.is_complex()]


def squared_distances(replies: Sequence[Reply]) -> torch.Tensor:
    """Squared Euclidean distances between replies, over all measured entries together.

    Returns:
        float64 ``[replies, replies]``; what is not a number is infinitely far from everything.
    """
    squares = torch.zeros(len(replies), len(replies), dtype=torch.float64)
    for name in measured(replies[0].state):
        points = stack(replies, name)
        for index, point in enumerate(points):
            squares[index, index + 1 :] += (points[index + 1 :] - point).square().sum(dim=1).cpu()
    return (squares + squares.T).nan_to_num(nan=torch.inf, posinf=torch.inf)
