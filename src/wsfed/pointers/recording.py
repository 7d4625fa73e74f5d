"""What a function does with pointers, noted instead of sent.

While a recording is active, a session's commands come here. Everything else happens as always:
shapes are inferred, graphs followed, errors raised at the user's line.

A recording has *parts*. Those of the function itself are recorded once. What an optimizer's step
does is a part of its own: its numbers come from Python state (a learning rate, a count of steps),
so that torch's own ``step()`` is asked again at each call, and only its numbers are sent.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

import msgpack
import torch

from wsfed.errors import ConstantTooLarge, NotCollocated, PlanError
from wsfed.plans.assembly import CAPTURE, CONSTANT, MADE, NUMBER
from wsfed.plans.program import Constant, renamed
from wsfed.plans.program import made as bound_by
from wsfed.pointers.autograd import Node
from wsfed.pointers.effects import Gradient, Marked, Retained
from wsfed.pointers.link import Link
from wsfed.pointers.shapes import Meta
from wsfed.pointers.site import Site, capture_site, describe_site
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.values import REF

__all__ = ["NO_VALUES", "Part", "Recording", "recorded", "recording_now", "unrecorded"]

_ACTIVE: ContextVar[Recording | None] = ContextVar("wsfed_recording", default=None)
#: The recording of this task or thread, if there is one.
recording_now: Final = _ACTIVE.get

#: Why a recording cannot tell a value.
NO_VALUES: Final = (
    "it is recorded, not run, so there are no values in it: return what is to be fetched, and "
    "write torch.where() where a value decides"
)
_RECORDED: Final = frozenset({m.Execute.code, m.Backward.code, m.Clone.code})


@dataclass(slots=True)
class Part:
    """A stretch of commands that is recorded, or asked for anew, as a whole.

    Attributes:
        optimizer: whose step it is; ``None`` for the function's own.
        raw: commands with the identifiers of the session.
        commands: the same with slots, once it is closed.
        sites: the user's line of each.
        events: what it did to the graph as it is known here (see ``effects``).
        captures: identifiers that it uses and did not make, by order of use.
        numbers: fractional numbers of an optimizer's step.
        constants: local tensors that it met.
        made: what it makes: identifier to ordinal.
        key: equal for parts that do the same.
    """

    optimizer: torch.optim.Optimizer | None
    raw: list[list[Any]] = field(default_factory=list)
    commands: list[list[Any]] = field(default_factory=list)
    sites: list[Site | None] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    captures: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    made: dict[int, int] = field(default_factory=dict)
    key: bytes = b""

    def close(self, stored: dict[int, torch.Tensor]) -> None:
        """Put slots where identifiers are."""
        slots: dict[int, int] = {}
        numbered: dict[tuple[Any, ...], int] = {}

        def use(id: int) -> int:
            known = slots.get(id)
            if known is not None:
                return known
            if id in stored:
                slots[id] = 4 * len(self.constants) + CONSTANT
                self.constants.append(Constant.of(stored[id]))
            else:
                slots[id] = 4 * len(self.captures) + CAPTURE
                self.captures.append(id)
            return slots[id]

        def bind(id: int) -> int:
            if id not in slots:
                self.made[id] = len(self.made)
                slots[id] = 4 * self.made[id] + MADE
            return slots[id]

        def number(at: tuple[Any, ...], value: float) -> Any:
            # Equal numbers in the same place of the same operation are one, until they differ.
            place = numbered.setdefault((*at, value.hex()), len(self.numbers))
            if place == len(self.numbers):
                self.numbers.append(value)
            return [REF, 4 * place + NUMBER]

        ask = None if self.optimizer is None else number
        self.commands = [renamed(command, use, ask, bind) for command in self.raw]
        said = [self.commands, [[c.spec.dtype, list(c.spec.shape), c.data] for c in self.constants]]
        self.key = sha256(msgpack.packb(said)).digest()


class Recording:
    """The commands of one session, while a function runs.

    Args:
        name: of the plan, for errors.
        link: the session; ``None`` for that of the first command.

    Attributes:
        parts: what was recorded.
        metas: of what was used and not made here, as it was at first.
        pointers: to what the function's own parts used and did not make.
        seen: told of each of these pointers when it is first used.
        alive: identifiers made here that a pointer still holds.
        gradients: of which pointers it was asked whether they had one before, and whether so.
        rates: what optimizers were set to behind their steps.
    """

    def __init__(self, name: str, link: Link | None = None) -> None:
        self.name, self.link = name, link
        self.parts = [Part(None)]
        self.metas: dict[int, Meta] = {}
        self.pointers: dict[int, Any] = {}
        self.seen: Callable[[Any], None] = lambda pointer: None
        self.alive: set[int] = set()
        self.gradients: list[tuple[Any, bool]] = []
        self.rates: list[tuple[torch.optim.Optimizer, list[Any]]] = []
        self._settled: set[Node | None] = set()
        self._born: set[int] = set()
        self._stored: dict[int, torch.Tensor] = {}
        self._held: list[tuple[int, int]] = []
        self._raw: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        if link is not None:
            link.recordings.append(self)

    @property
    def part(self) -> Part:
        """The part that is being recorded."""
        return self.parts[-1]

    # --- what a session does ---

    def issue(self, link: Link, command: list[Any], site: Site | None) -> None:
        """A command."""
        self._belongs(link, site)
        if command[0] not in _RECORDED:
            self.refuse(f"{m.BY_CODE[command[0]].__name__.lower()} has no place in a plan")
        new = [id for id in bound_by(command) if id not in self.metas]
        self._born.update(new)
        self.alive.update(new)
        self.part.raw.append(command)
        self.part.sites.append(site)
        self._raw.append((link.issue, (command, site)))

    def store(
        self, link: Link, id: int, tensor: torch.Tensor, requires_grad: bool, site: Site | None
    ) -> None:
        """A local tensor: it becomes a constant."""
        self._belongs(link, site)
        if requires_grad:
            self.refuse("a tensor that requires grad is sent in it; send it before and capture it")
        if tensor.nbytes > limits.MAX_CONSTANT_BYTES:
            raise ConstantTooLarge(f"plan {self.name!r}", tensor.nbytes, limits.MAX_CONSTANT_BYTES)
        self._stored[id] = tensor.detach().clone()
        self._born.add(id)
        self.alive.add(id)
        self._raw.append((link.store, (id, self._stored[id], requires_grad, site)))

    def release(self, id: int, nbytes: int) -> None:
        """Nobody holds this any more. What was there before is let go behind the plan's run."""
        if id in self._born:
            self.alive.discard(id)
        else:
            self._held.append((id, nbytes))

    def made(self, id: int) -> bool:
        """Whether this was made here."""
        return id in self._born

    def refuse(self, why: str) -> Any:
        """Raise a :class:`PlanError` that names the user's line."""
        raise PlanError(self.name, why, describe_site(capture_site()))

    def _belongs(self, link: Link, site: Site | None) -> None:
        if self.link is None:
            self.link = link
            link.recordings.append(self)
        elif link is not self.link:
            names = (self.link.worker.id, link.worker.id)
            raise NotCollocated(f"plan {self.name!r}", names, describe_site(site))

    # --- what pointers tell ---

    def saw(self, pointers: list[Any]) -> None:
        """These are used now."""
        for pointer in pointers:
            handle = getattr(pointer, "_handle", None)
            if handle is None or handle.id in self._born:
                continue
            meta = pointer._known()
            self.metas.setdefault(handle.id, meta)
            if self.part.optimizer is None and handle.id not in self.pointers:
                self.pointers[handle.id] = pointer
                self.seen(pointer)

    def marked(
        self, roots: list[Node], only: set[Node] | None, marked: set[Node], *, create_graph: bool
    ) -> None:
        """A backward pass ran."""
        self._settled |= marked
        wanted = None if only is None else tuple(only)
        self.part.events.append(Marked(tuple(roots), wanted, create_graph))

    def gradient_set(self, pointer: Any, parents: tuple[Node, ...] | None) -> None:
        """A gradient was set (to one that depends on ``parents``), or taken away."""
        node = pointer._graph_node()
        self._settled.add(node)
        self.part.events.append(Gradient(pointer._handle.id, node, parents))

    def retained(self, pointer: Any) -> None:
        """A tensor was told to keep its gradient."""
        self.part.events.append(Retained(pointer._graph_node()))

    def asked_for_gradient(self, pointer: Any) -> None:
        """Whether there is a gradient was asked: what is recorded holds for this answer only."""
        self.saw([pointer])
        node: Node | None = pointer.__dict__.get("_node")
        if self.part.optimizer is None and not self.is_new(pointer) and node not in self._settled:
            self.gradients.append((pointer, node is not None and node.has_grad))

    def is_new(self, pointer: Any) -> bool:
        """Whether what it points to was made here."""
        return self.made(pointer._handle.id)

    # --- parts ---

    def begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer begins a step."""
        _forget_gradients(optimizer)
        self.parts.append(Part(optimizer))

    def end_step(self) -> None:
        """It has ended."""
        assert self.part.optimizer is not None
        _forget_gradients(self.part.optimizer)
        self.parts.append(Part(None))

    def step_again(self, optimizer: torch.optim.Optimizer) -> Part:
        """Ask an optimizer what its step does now."""
        part = Part(optimizer)
        self.parts.append(part)
        _forget_gradients(optimizer)
        with recorded(self):
            optimizer.step()
        _forget_gradients(optimizer)
        part.close(self._stored)
        return part

    def close(self, results: set[int]) -> list[tuple[int, Part]]:
        """Close all parts; gives what is still held and is no result, with the part it is of."""
        if not self.alive <= results:
            gc.collect()  # frames and graphs in cycles may hold what nobody can reach
        for part in self.parts:
            part.close(self._stored)
        left = sorted(self.alive - results - self._stored.keys())
        return [(id, part) for id in left for part in self.parts if id in part.made]

    def end(self) -> None:
        """Let go what was held back; behind the command that runs the plan."""
        if self.link is not None:
            self.link.recordings.remove(self)
            for id, nbytes in self._held:
                self.link.release(id, nbytes)

    def send_anyway(self) -> None:
        """Send the commands one by one instead: what is known here of the graph stays true."""
        for send, given in self._raw:
            send(*given)
        for id in self._born - self.alive:
            self._held.append((id, 0))


def _forget_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Have ``p.grad`` asked for anew, so that a step needs nothing that was got before it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.__dict__.pop("_grad_pointer", None)


@contextmanager
def recorded(recording: Recording) -> Iterator[Recording]:
    """While this lasts, commands of this task or thread go to ``recording``."""
    token = _ACTIVE.set(recording)
    try:
        yield recording
    finally:
        _ACTIVE.reset(token)


@contextmanager
def unrecorded() -> Iterator[None]:
    """While this lasts, commands are sent although a recording is active."""
    token = _ACTIVE.set(None)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
