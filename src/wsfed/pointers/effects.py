"""What a recorded function does to the graph as this side knows it, done again at each call.

The worker's graph comes about by running the program. This side's (:mod:`wsfed.pointers.autograd`)
has to follow: which leaves have a gradient, on what the results depend, of what they are views,
what was written to. While a function is recorded that happens by itself; here it is kept as a
template, with the nodes of what was there before left open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from wsfed.pointers.autograd import Node, mark
from wsfed.pointers.shapes import Meta
from wsfed.pointers.views import node_of

__all__ = ["Effects", "Gradient", "Marked", "NodeForm", "Retained", "StateForm", "Watch"]

_State: TypeAlias = dict[str, Any]


# --- events, in the order in which they happened --------------------------------------------------
# While a function is recorded they name nodes; in a template they name numbers (see Effects).


@dataclass(frozen=True, slots=True)
class Marked:
    """A backward pass ran."""

    roots: tuple[Any, ...]
    only: tuple[Any, ...] | None
    create_graph: bool

    def renamed(self, name: Callable[[Any], Any]) -> Marked:
        """The same with other names for the nodes."""
        only = None if self.only is None else tuple(map(name, self.only))
        return Marked(tuple(map(name, self.roots)), only, self.create_graph)

    @property
    def nodes(self) -> tuple[Any, ...]:
        """The nodes that it names."""
        return (*self.roots, *(self.only or ()))


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient of ``id`` was set (to one that depends on ``parents``), or taken away."""

    id: int
    node: Any
    parents: tuple[Any, ...] | None

    def renamed(self, name: Callable[[Any], Any]) -> Gradient:
        """The same with other names for the nodes."""
        parents = None if self.parents is None else tuple(map(name, self.parents))
        return Gradient(self.id, name(self.node), parents)

    @property
    def nodes(self) -> tuple[Any, ...]:
        """The nodes that it names."""
        return (self.node, *(self.parents or ()))


@dataclass(frozen=True, slots=True)
class Retained:
    """A tensor was told to keep its gradient."""

    node: Any

    def renamed(self, name: Callable[[Any], Any]) -> Retained:
        """The same with another name for the node."""
        return Retained(name(self.node))

    @property
    def nodes(self) -> tuple[Any, ...]:
        """The node that it names."""
        return (self.node,)


Event: TypeAlias = Marked | Gradient | Retained


@dataclass(slots=True)
class _Watched:
    """A state that was there before, as it was then."""

    state: _State
    meta: Meta
    node: Node | None
    writes: int

    @staticmethod
    def of(state: _State) -> _Watched:
        node = node_of(state) if state["_meta"].requires_grad else state.get("_node")
        return _Watched(state, state["_meta"], node, state.get("_writes", 0))

    @property
    def is_changed(self) -> bool:
        state = self.state
        before = (self.meta, self.node, self.writes)
        return (state["_meta"], state.get("_node"), state.get("_writes", 0)) != before


class Watch:
    """Follows what was there before a recording, from the moment it is first used.

    A place is the identifier of a pointer, negative for the root of what it is a view of.
    """

    def __init__(self) -> None:
        self.places: dict[int, _Watched] = {}

    def add(self, pointer: Any) -> None:
        """This pointer is used."""
        state, id = pointer.__dict__, pointer._handle.id
        self.places[id] = _Watched.of(state)
        root = state.get("_view_of")
        if root is not None and root.get("_meta") is not None:
            self.places[-id] = _Watched.of(root)


# --- the template ---------------------------------------------------------------------------------


@dataclass(slots=True)
class NodeForm:
    """A node to be made."""

    retains: bool
    is_guess: bool
    parents: tuple[int, ...]


@dataclass(slots=True)
class StateForm:
    """A pointer's state to be made, or to be changed.

    Attributes:
        meta: what it is like.
        node: its node.
        writes: to it; those that are new, where it was there before.
        behind: writes to its root that it has not seen, where it is a view.
        is_odd: whether it is marked as odd.
        root: the root of a view: ``("old", place)`` or ``("made", number)``.
    """

    meta: Meta | None
    node: int | None
    writes: int
    behind: int
    is_odd: bool
    root: tuple[str, int] | None


@dataclass(slots=True)
class Effects:
    """A template of everything a recorded function does here. Nodes are numbers: from 0 on those
    that are made, below 0 those of what was there before (-1 for the first place).

    Attributes:
        places: what was there before (see :class:`Watch`), and whether it has a node.
        nodes: to be made.
        made: states of the results, and of the roots of views that nobody holds.
        changed: states of what was there before.
        events: of each part.
    """

    places: dict[int, bool]
    nodes: list[NodeForm]
    made: list[StateForm]
    changed: dict[int, StateForm]
    events: list[list[Event]]

    @staticmethod
    def of(watch: Watch, events: list[list[Event]], results: list[Any]) -> Effects:
        """Take the template at the end of a recording.

        Args:
            watch: of what was there before.
            events: of each part.
            results: pointers to what was made and is given back.
        """
        states = [result.__dict__ for result in results]
        roots = {id(state): ("made", number) for number, state in enumerate(states)}
        roots |= {id(e.state): ("old", place) for place, e in reversed(watch.places.items())}
        for state in list(states):  # roots that only a view knows
            root = state.get("_view_of")
            if root is not None and id(root) not in roots:
                roots[id(root)] = ("made", len(states))
                states.append(root)
        changed = {place: each for place, each in watch.places.items() if each.is_changed}
        kept = [state.get("_node") for state in (*states, *(e.state for e in changed.values()))]
        kept += [node for part in events for event in part for node in event.nodes]
        nodes = _Nodes(watch, [node for node in kept if node is not None])
        forms = {place: _form(e.state, nodes, roots) for place, e in changed.items()}
        for place, each in changed.items():
            forms[place].writes -= each.writes
        return Effects(
            {place: each.node is not None for place, each in watch.places.items()},
            nodes.forms(),
            [_form(state, nodes, roots) for state in states],
            forms,
            [[event.renamed(nodes.number) for event in part] for part in events],
        )

    # --- doing it again ---

    def begin(self, pointers: dict[int, Any]) -> Again:
        """Do it again, with these pointers in the places of what was there."""
        return Again(self, pointers)


class _Nodes:
    """Numbers the nodes of a recording."""

    def __init__(self, watch: Watch, kept: list[Node]) -> None:
        places = list(enumerate(watch.places.values()))
        self._old = {e.node: -1 - place for place, e in reversed(places) if e.node is not None}
        seen: set[Node] = set()
        pending = list(kept)
        while pending:
            node = pending.pop()
            if node not in seen and node not in self._old:
                seen.add(node)
                pending.extend(node.parents)
        # Those that keep a gradient, or stand for one, are needed wherever they are.
        wanted = [*kept, *(node for node in seen if node.retains or node.is_guess)]
        new = dict.fromkeys(node for node in wanted if node not in self._old)
        self._new = {node: number for number, node in enumerate(new)}

    def number(self, node: Node) -> int:
        """The number of a node that is needed by itself."""
        found = self._old.get(node)
        return self._new[node] if found is None else found

    def forms(self) -> list[NodeForm]:
        """How the new ones are made."""
        return [NodeForm(n.retains, n.is_guess, self._parents(n)) for n in self._new]

    def _parents(self, node: Node) -> tuple[int, ...]:
        """The numbered nodes that it depends on, past those that are not needed."""
        found: dict[int, None] = {}
        seen: set[Node] = set()
        pending = list(node.parents)
        while pending:
            each = pending.pop()
            if each in seen:
                continue
            seen.add(each)
            if each in self._old or each in self._new:
                found[self.number(each)] = None
            else:
                pending.extend(each.parents)
        return tuple(found)


def _form(state: _State, nodes: _Nodes, roots: dict[int, tuple[str, int]]) -> StateForm:
    node, root = state.get("_node"), state.get("_view_of")
    return StateForm(
        state["_meta"],
        None if node is None else nodes.number(node),
        state.get("_writes", 0),
        0 if root is None else root.get("_writes", 0) - state.get("_seen", 0),
        "_odd" in state,
        None if root is None else roots.get(id(root)),
    )


class Again:
    """The effects of one call."""

    def __init__(self, effects: Effects, pointers: dict[int, Any]) -> None:
        self._effects, self._pointers = effects, pointers
        self._states = {
            place: pointers[place].__dict__ if place > 0 else pointers[-place].__dict__["_view_of"]
            for place in effects.places
        }
        self._old = [
            node_of(self._states[place]) if has_node else None
            for place, has_node in effects.places.items()
        ]
        self._new = [Node() for _ in effects.nodes]
        for node, form in zip(self._new, effects.nodes, strict=True):
            node.retains, node.is_guess = form.retains, form.is_guess
            node.parents = tuple(map(self._node, form.parents))

    def _node(self, number: int) -> Node:
        found = self._new[number] if number >= 0 else self._old[-1 - number]
        assert found is not None
        return found

    def part(self, number: int) -> None:
        """What a part did to gradients."""
        for event in self._effects.events[number]:
            match event:
                case Marked(roots, only, create_graph):
                    wanted = None if only is None else set(map(self._node, only))
                    mark(map(self._node, roots), only=wanted, create_graph=create_graph)
                case Gradient(id, node, parents):
                    target = self._node(node)
                    target.has_grad = parents is not None
                    target.grad_parents = tuple(map(self._node, parents or ()))
                    if id in self._pointers:
                        self._pointers[id].__dict__["_grad_pointer"] = None
                case Retained(node):
                    self._node(node).retains = True

    def end(self, results: list[Any]) -> None:
        """What it left behind: the states of what it changed, and of the results."""
        for place, form in self._effects.changed.items():
            self._change(place, form)
        for place, form in self._effects.changed.items():
            if (root := self._states[place].get("_view_of")) is not None:
                self._states[place]["_seen"] = root.get("_writes", 0) - form.behind
        hidden = self._effects.made[len(results) :]
        states = [*(each.__dict__ for each in results), *({"_meta": f.meta} for f in hidden)]
        for state, form in zip(states, self._effects.made, strict=True):
            if form.writes:
                state["_writes"] = form.writes
            if form.node is not None:
                state["_node"] = self._node(form.node)
            if form.is_odd:
                state["_odd"] = None
        for state, form in zip(states, self._effects.made, strict=True):
            if form.root is not None:
                kind, place = form.root
                root = states[place] if kind == "made" else self._states[place]
                state["_view_of"] = state["_odd"] = root
                state["_seen"] = root.get("_writes", 0) - form.behind

    def _change(self, place: int, form: StateForm) -> None:
        state = self._states[place]
        if place > 0 and form.meta is not None:
            self._pointers[place]._set_meta(form.meta)
        state["_meta"] = form.meta
        if form.node is not None or state.get("_node") is not None:
            state["_node"] = None if form.node is None else self._node(form.node)
        if form.writes:
            state["_writes"] = state.get("_writes", 0) + form.writes
