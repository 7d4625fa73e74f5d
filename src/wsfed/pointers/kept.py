"""What a plan keeps of a recording, and what becomes of it at a call."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any, Final, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from wsfed.errors import PointerError
from wsfed.plans.assembly import Piece
from wsfed.plans.program import Program, Spec
from wsfed.pointers.effects import Effects
from wsfed.pointers.link import Link
from wsfed.pointers.pointer import Pointer
from wsfed.pointers.recording import Part, Recording
from wsfed.pointers.shapes import Meta
from wsfed.pointers.site import Site, StepSites
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.tensors import DTYPE_NAMES

__all__ = [
    *("Assembled", "Call", "Kept", "Source", "Step", "Use", "names_of", "settings_of"),
    "template_of",
]

#: Where a capture of a part comes from: ``("argument", place)``, ``("captured", identifier)`` as it
#: was recorded, ``("made", (part, ordinal))``, or ``("step", None)`` for what an optimizer uses.
Source: TypeAlias = tuple[str, Any]


@dataclass(slots=True)
class Call:
    """A call: what it is told apart by, and the pointers among its arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: tuple[Any, ...]
    pointers: list[Pointer]
    ids: list[int]
    link: Link | None


@dataclass(slots=True)
class Use:
    """A part with what it is given.

    Attributes:
        sources: where each of its captures comes from.
        metas: of each of them; ``None`` for what an earlier part made.
        ids: of them, without what earlier parts made.
        key: equal for uses that become the same program.
    """

    part: Part
    sources: list[Source]
    metas: tuple[Meta | None, ...]
    ids: list[int]
    key: Any = field(init=False)

    def __post_init__(self) -> None:
        linked = tuple([place for kind, place in self.sources if kind == "made"])
        self.key = self.part.key, linked, self.metas

    @staticmethod
    def of_step(part: Part, metas: dict[int, Meta]) -> Use:
        """An optimizer's step, which finds what it uses by itself."""
        sources: list[Source] = [("step", None)] * len(part.captures)
        return Use(part, sources, tuple([metas[id] for id in part.captures]), part.captures)

    def again(self, pointers: dict[int, Pointer], call: Call) -> Use:
        """The same part with the pointers of another call."""
        ids = [
            call.ids[place] if kind == "argument" else pointers[place]._handle.id
            for kind, place in self.sources
            if kind != "made"
        ]
        return replace(self, ids=ids)

    def piece(self) -> Piece:
        """For the assembly."""
        captures = [
            place if meta is None else _spec(meta)
            for meta, (_, place) in zip(self.metas, self.sources, strict=True)
        ]
        part = self.part
        is_step = part.optimizer is not None
        return Piece(part.commands, part.constants, part.numbers, captures, is_step)


def _spec(meta: Meta) -> Spec:
    return Spec(DTYPE_NAMES[meta.dtype], meta.shape)


@dataclass(slots=True)
class Kept:
    """What the function did for one kind of call.

    Attributes:
        link: the session it was recorded on.
        ids: of the arguments then; they stand for the arguments of any call.
        uses: its parts.
        wanted: where the results are made.
        metas: of what it used, by identifier.
        pointers: that it captured, by identifier.
        gradients: which had one before, where it asked.
        modules: that it called, and what they were set to.
        effects: what it does to the graph as it is known here.
        template: the leaves of its result: ``(kind, value)``.
        tree: how the result is built of them.
    """

    link: Any
    ids: list[int]
    uses: list[Use]
    wanted: list[tuple[int, int]]
    metas: dict[int, Meta]
    pointers: dict[int, Any]
    gradients: list[tuple[int, bool]]
    modules: dict[nn.Module, Any]
    effects: Effects
    template: list[tuple[str, Any]]
    tree: pytree.TreeSpec

    def link_for(self, call: Call) -> Any:
        """The session that a call is for."""
        for pointer in (*call.pointers, *self.pointers.values()):
            if not isinstance(pointer, Pointer):
                raise PointerError("what the plan uses is not on a worker: send it first")
            return pointer._handle.link
        return self.link

    def holds(self, call: Call) -> bool:
        """Whether the function would do the same now, as far as can be told.

        Raises:
            PointerError: something that it uses is not on a worker (any more).
        """
        link = self.link_for(call)
        for id, pointer in self.pointers.items():
            if not isinstance(pointer, Pointer):
                raise PointerError("what the plan uses is not on a worker: send it first")
            if pointer._handle.link is not link or pointer._known() is not self.metas[id]:
                return False
        for id, had in self.gradients:
            pointer = call.pointers[self.ids.index(id)] if id in self.ids else self.pointers[id]
            node = pointer.__dict__.get("_node")
            if (node is not None and node.has_grad) is not had:
                return False
        return all(_is_as(module, settings) for module, settings in self.modules.items())

    def build(self, results: Sequence[Pointer], call: Call) -> Any:
        """The result of a call."""
        leaves = [
            results[value]
            if kind == "made"
            else call.pointers[value]
            if kind == "argument"
            else value
            for kind, value in self.template
        ]
        return pytree.tree_unflatten(leaves, self.tree)


def template_of(leaf: Any, call: Call, made: list[int]) -> tuple[str, Any]:
    """Where a leaf of the result comes from: ``("made" | "argument", place)`` or itself."""
    if not isinstance(leaf, Pointer):
        return "value", leaf
    id = leaf._handle.id
    if id in made:
        return "made", made.index(id)
    return ("argument", call.ids.index(id)) if id in call.ids else ("value", leaf)


#: Programs that a session has on its worker at a time; older ones are shipped again when needed.
_MOST_SHIPPED: Final = limits.MAX_PLANS // 2


class _Shipped:
    """A program that a worker keeps, as long as this is held."""

    def __init__(self, link: Link, id: int) -> None:
        self.id, self._link = id, weakref.ref(link)

    def drop(self) -> None:
        """Have the worker forget it."""
        if (link := self._link()) is not None and self.id:
            link.release(self.id)
        self.id = 0

    __del__ = drop


@dataclass(slots=True)
class Assembled:
    """A program, the lines that its steps are of, what its inputs are called, and who keeps it."""

    program: Program
    sites: StepSites
    names: Sequence[str]
    shipped: weakref.WeakKeyDictionary[Link, _Shipped] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def lines(self) -> Iterator[str]:
        """The program for people; an input that comes twice is told of once."""
        told: set[str] = set()
        for line in self.program.lines(dict(enumerate(self.names, 1))):
            if line not in told or "=" in line:
                yield line
            told.add(line)

    def ship(self, link: Link, site: Site | None) -> int:
        """Have a worker keep the program, if it does not yet; what it is called there."""
        found = self.shipped.get(link)
        if found is None or not found.id:
            known: _Shipped | None = link.plans.get(self.program.hash)
            if known is None or not known.id:
                while len(link.plans) >= _MOST_SHIPPED:
                    link.plans.pop(next(iter(link.plans.keys()))).drop()
                known = link.plans[self.program.hash] = _Shipped(link, link.new_id())
                link.define(known.id, self.program.packed, site)
            found = self.shipped[link] = known
        return found.id


@dataclass(slots=True)
class Step:
    """A program that is to run now, and what it runs with."""

    assembled: Assembled
    kept: Kept
    recording: Recording
    inputs: list[int]
    numbers: list[float]
    outs: list[int]
    pointers: Sequence[Pointer]
    result: Any

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that step in it."""
        return [use.part.optimizer for use in self.kept.uses if use.part.optimizer is not None]

    @property
    def has_extra(self) -> bool:
        """Whether it makes what is kept outside of it, such as an optimizer's state."""
        return len(self.outs) > len(self.kept.wanted)

    def run(self, site: Site | None) -> None:
        """Have it run once."""
        link = self.recording.link
        if link is not None and self.assembled.program.steps:
            plan = self.assembled.ship(link, site)
            command = [m.Run.code, plan, self.inputs, self.numbers, self.outs]
            link.issue(command, self.assembled.sites.called_at(site))
        self.recording.end()
        for pointer in self.pointers:
            if pointer.__dict__["_meta"] is None and pointer._handle.link.blocking:
                pointer.resolve()


#: Settings of a module that a plan looks at: a probability, whether it is in training.
_SETTINGS: Final = frozenset({bool, int, float, str})


def settings_of(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """What a module is set to, and which parameters, buffers and layers it has itself."""
    own = [*module._parameters.values(), *module._buffers.values(), *module._modules.values()]
    return [value for value in vars(module).values() if type(value) in _SETTINGS], own


def _is_as(module: nn.Module, settings: tuple[list[Any], list[Any]]) -> bool:
    set_to, own = settings_of(module)
    before, had = settings
    return set_to == before and len(own) == len(had) and all(map(is_, own, had))


def names_of(ids: Sequence[int], kept: Kept, function: Callable[..., Any]) -> list[str]:
    """What people call these: arguments, parameters of modules, the state of optimizers."""
    names: dict[int, str] = {}
    try:
        parameters = list(inspect.signature(function).parameters)
    except ValueError:  # torch's own functions have none
        parameters = []
    for place, id in enumerate(kept.ids):
        is_plain = len(parameters) == len(kept.ids)
        names[id] = parameters[place] if is_plain else f"arg{place}"
    for module in kept.modules:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if isinstance(tensor, Pointer):
                names.setdefault(tensor._handle.id, name)
    for use in kept.uses:
        if use.part.optimizer is not None:
            _name_state(use.part.optimizer, names)
    return [names.get(id, f"in{place}") for place, id in enumerate(ids)]


def _name_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
    every = [each for group in optimizer.param_groups for each in group["params"]]
    for place, parameter in enumerate(every):
        if isinstance(parameter, Pointer):
            name = names.setdefault(parameter._handle.id, f"p{place}")
            for word, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Pointer):
                    names.setdefault(value._handle.id, f"{name}.{word}")
