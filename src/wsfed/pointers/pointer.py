"""The pointer: a ``torch.Tensor`` without values here, and a tensor with values there.

Its payload is a meta tensor, so shape, dtype and strides are local and exact. Every torch function
on it becomes one command to its worker (:mod:`wsfed.pointers.calls`), and gives pointers again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, Final

import torch

from wsfed.errors import OpNotAllowed, PointerError, ValueNeeded
from wsfed.pointers import calls
from wsfed.pointers.autograd import Node
from wsfed.pointers.gradients import backward, grad
from wsfed.pointers.handle import Handle
from wsfed.pointers.link import Link, link_of
from wsfed.pointers.local import LOCAL
from wsfed.pointers.recording import recording_now
from wsfed.pointers.shapes import Meta, intern_meta
from wsfed.pointers.site import Site, capture_site
from wsfed.pointers.views import followed, node_of
from wsfed.protocol import messages as m
from wsfed.protocol.values import REF
from wsfed.tensors import DTYPES

__all__ = ["Pointer", "make_pointer", "make_result", "make_sent", "transfer"]

_OFF = torch._C.DisableTorchFunctionSubclass
_empty = torch.empty_strided
_META = torch.device("meta")


class Pointer(torch.Tensor):
    """A tensor on a worker. Made by ``worker.send(tensor)`` and by operations on pointers.

    In the blocking world (``wsfed.sync``) what is awaited here returns its result.
    """

    _handle: Handle
    _meta: Meta | None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Every torch function that meets a pointer comes here."""
        local = _ANSWERED.get(func)
        if local is not None:
            return local(*args, **(kwargs or {}))
        return calls.call(func, args, kwargs or {})

    # --- where it is ---

    @property
    def location(self) -> Any:
        """The worker that has the tensor."""
        return self._handle.link.worker

    @property
    def id_at_location(self) -> int:
        """The tensor's identifier there."""
        return self._handle.id

    @property
    def owner(self) -> str:
        """Who holds the pointer: this program, which PySyft's tutorials call ``me``."""
        return "me"

    def is_alive(self) -> bool:
        """Whether the session still exists."""
        return not self._handle.link.closed

    # --- bringing it back and sending it on ---

    def get(self) -> Any:
        """The value: an awaitable whose request has left already. The pointer stays good.

        Raises (when awaited):
            RemoteError: an operation that led to it failed; the error names its line.
            GetNotPermitted: it holds rows of a private data set.
            ConnectionLost, SessionLost: the worker is gone.
        """
        return self._handle.link.settle(self._fetch(capture_site()))

    def _fetch(self, site: Site | None) -> Awaitable[torch.Tensor]:
        state = self.__dict__
        meta = followed(state) if "_view_of" in state else state["_meta"]
        return self._handle.link.fetch(self._handle.id, site, meta)

    def __await__(self) -> Generator[Any, None, torch.Tensor]:
        if self._handle.link.blocking:
            raise PointerError("this pointer is of a blocking worker: write pointer.get()")
        waiting: Generator[Any, None, torch.Tensor] = self.get().__await__()
        return waiting

    def move(self, worker: Any) -> Pointer:
        """A pointer to the tensor on another worker; operations there wait for it to arrive."""
        to = link_of(worker)
        if to is self._handle.link:
            return self
        return self._transfer(to)

    def copy(self, worker: Any = None) -> Pointer:
        """An independent copy, on the same worker or on another one: a leaf of its own."""
        if worker is None or link_of(worker) is self._handle.link:
            return self._clone()
        return self._transfer(link_of(worker))

    def _transfer(self, to: Link) -> Pointer:
        return transfer([self], to)[0]

    def _clone(self) -> Pointer:
        link, meta = self._handle.link, self._known()
        if (recording := recording_now()) is not None:
            recording.saw([self])
        id = link.new_id()
        link.issue(m.Clone(self._handle.id, id).wire(), capture_site())
        return _make(
            link, id, intern_meta(meta.shape, _dense(meta), meta.dtype, meta.requires_grad, True)
        )

    def tag(self, *tags: str) -> Pointer:
        """Add tags, by which a search finds the tensor."""
        self._handle.link.issue(m.Tag(self._handle.id, list(tags), "").wire(), capture_site())
        return self

    def describe(self, text: str) -> Pointer:
        """Add a description."""
        self._handle.link.issue(m.Tag(self._handle.id, [], text).wire(), capture_site())
        return self

    def resolve(self) -> Any:
        """Ask the worker for the shape, where it depends on values; gives the pointer."""
        link = self._handle.link
        asked = link.ask(
            lambda request: m.Describe(request, self._handle.id).wire(), capture_site()
        )

        async def learn() -> Pointer:
            told = await asked
            self._set_meta(
                intern_meta(
                    tuple(told["shape"]),
                    tuple(told["stride"]),
                    DTYPES[told["dtype"]],
                    told["requires_grad"],
                    told["is_leaf"],
                )
            )
            return self

        return link.run(learn())

    # --- autograd ---

    def _requires_grad(self) -> bool:
        return self._known().requires_grad

    def _is_leaf(self) -> bool:
        return self._known().is_leaf

    def _grad_fn(self) -> Node | None:
        return None if self._known().is_leaf else self._graph_node()

    def _graph_node(self) -> Node:
        """The node of a pointer that requires grad; a leaf gets one when it is first needed."""
        state = self.__dict__
        if "_view_of" in state:
            followed(state)
        return node_of(state)

    def _get_grad(self) -> Pointer | None:
        if (recording := recording_now()) is not None:
            recording.asked_for_gradient(self)
        node: Node | None = self.__dict__.get("_node")
        if node is None or not node.has_grad:
            return None
        kept = self.__dict__.get("_grad_pointer")
        if kept is not None and kept[0] == node.generation:
            found: Pointer = kept[1]
            return found
        link, meta = self._handle.link, self._known()
        id = link.new_id()
        link.issue(
            [m.Execute.code, "torch.Tensor.grad.__get__", [id], [[REF, self._handle.id]], {}, 0],
            capture_site(),
        )
        in_graph = bool(node.grad_parents)
        grad_meta = intern_meta(meta.shape, meta.stride, meta.dtype, in_graph, not in_graph)
        made = _make(link, id, grad_meta)
        if in_graph:
            made.__dict__["_node"] = Node(node.grad_parents, is_guess=True)
        if not node.is_sure and link.blocking and recording is None:
            try:
                made.resolve()
            except OpNotAllowed:  # there is none after all
                node.has_grad, node.is_sure = False, True
                return None
            node.is_sure = True
        self.__dict__["_grad_pointer"] = (node.generation, made)
        return made

    def _set_grad(self, value: torch.Tensor | None) -> None:
        recording = recording_now()
        if value is None and recording is None and not self._graph_node().has_grad:
            return
        if value is not None and not isinstance(value, Pointer):
            value = make_sent(self._handle.link, value)
        self._check_grad(value)
        if recording is not None:
            recording.saw([self] if value is None else [self, value])
        wire = None if value is None else [REF, value._handle.id]
        self._handle.link.issue(
            [
                m.Execute.code,
                "torch.Tensor.grad.__set__",
                [],
                [[REF, self._handle.id], wire],
                {},
                0,
            ],
            capture_site(),
        )
        node = self._graph_node()
        node.has_grad, node.grad_parents = value is not None, ()
        if value is not None and value._known().requires_grad:
            node.grad_parents = (value._graph_node(),)
        if recording is not None:
            recording.gradient_set(self, None if value is None else node.grad_parents)
        self.__dict__["_grad_pointer"] = None if value is None else (node.generation, value)

    def _check_grad(self, value: Pointer | None) -> None:
        if value is None:
            return
        if value._handle.link is not self._handle.link:
            raise PointerError("a gradient has to be on the worker of its tensor")
        if value._known().shape != self._known().shape:
            raise RuntimeError(
                f"assigned grad has data of a different size: {list(value._known().shape)}, "
                f"not {list(self._known().shape)}"
            )

    def _backward(
        self,
        gradient: torch.Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[torch.Tensor] | torch.Tensor | None = None,
    ) -> None:
        backward(self, gradient, retain_graph, create_graph, inputs=inputs)

    def _retain_grad(self) -> None:
        self._graph_node().retains = True
        if (recording := recording_now()) is not None:
            recording.saw([self])
            recording.retained(self)
        self._handle.link.issue(
            [m.Execute.code, "torch.Tensor.retain_grad", [], [[REF, self._handle.id]], {}, 0],
            capture_site(),
        )

    # --- metadata ---

    def _known(self) -> Meta:
        state = self.__dict__
        meta: Meta | None = followed(state) if "_view_of" in state else state["_meta"]
        if meta is None:
            self.size()  # raises
            raise AssertionError("unreachable")
        return meta

    def _set_meta(self, meta: Meta) -> None:
        old: Meta | None = self.__dict__["_meta"]
        self.__dict__["_meta"] = meta
        self._handle.nbytes = meta.nbytes
        if old is None or (old.shape, old.stride, old.dtype) != (
            meta.shape,
            meta.stride,
            meta.dtype,
        ):
            with _OFF():
                self.data = _empty(meta.shape, meta.stride, dtype=meta.dtype, device=_META)
        if old is None or old.requires_grad != meta.requires_grad:
            with _OFF():
                self.requires_grad_(meta.requires_grad)

    # --- Python around it ---

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        handle, meta = self._handle, self.__dict__.get("_meta")
        what = (
            "unresolved"
            if meta is None
            else f"{str(meta.dtype).removeprefix('torch.')}{list(meta.shape)}"
        )
        grad = ", requires_grad=True" if meta is not None and meta.requires_grad else ""
        return f"<Pointer {handle.link.worker.id}:{handle.id} {what}{grad}>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        meta = self.__dict__["_meta"]
        if not spec or meta is None or meta.shape:
            return format(repr(self), spec)
        if not self._handle.link.blocking:
            raise ValueNeeded(f"format {spec!r}", repr(self))
        return format(self.get().detach(), spec)

    def __hash__(self) -> int:
        return id(self)

    def __copy__(self) -> Pointer:
        made = _make(self._handle.link, 0, self.__dict__["_meta"], self._handle)
        made.__dict__.update(self.__dict__)
        return made

    def _deepcopy(self, memo: dict[int, Any]) -> Pointer:
        if id(self) in memo:
            known: Pointer = memo[id(self)]
            return known
        if not self._known().is_leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user (graph leaves) support the deepcopy "
                "protocol at the moment."
            )
        made = memo[id(self)] = self._clone()
        if self.__dict__.get("_is_param"):
            made.__dict__["_is_param"] = True
        return made

    def new_tensor(  # type: ignore[override]
        self, data: Any, *, dtype: torch.dtype | None = None, requires_grad: bool = False, **_: Any
    ) -> Pointer:
        """A tensor of this dtype beside this one, of data that is here or of a pointer."""
        if isinstance(data, Pointer):
            beside: Any = data.detach().to(dtype or self._known().dtype, copy=True)
            return beside.requires_grad_(requires_grad)  # type: ignore[no-any-return]
        made = torch.tensor(data, dtype=dtype or self._known().dtype, requires_grad=requires_grad)
        return make_sent(self._handle.link, made)


def _dense(meta: Meta) -> tuple[int, ...]:
    with _OFF():
        there = _empty(meta.shape, meta.stride, dtype=meta.dtype, device=_META)
        return torch.empty_like(there).stride()


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _make(link: Link, id: int, meta: Meta | None, handle: Handle | None = None) -> Pointer:
    """A pointer; ``meta`` is ``None`` while the shape is not known."""
    if meta is None:
        made: Any = _empty((0,), (1,), device=_META)
        state = made.__dict__
        state["_handle"] = handle or Handle(link, id)
    else:
        # That the payload requires grad, too, is how a custom Function is noticed (see calls).
        made = _empty(
            meta.shape,
            meta.stride,
            dtype=meta.dtype,
            device=_META,
            requires_grad=meta.requires_grad,
        )
        state = made.__dict__
        state["_handle"] = handle or Handle(link, id, meta.nbytes)
    made.__class__ = Pointer
    state["_meta"] = meta
    pointer: Pointer = made
    return pointer


def make_pointer(
    link: Link,
    id: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    requires_grad: bool = False,
) -> Pointer:
    """A pointer to a contiguous leaf that the worker has, or will have, under ``id``."""
    meta = intern_meta(tuple(shape), _contiguous(shape), dtype, requires_grad, True)
    return _make(link, id, meta)


def make_result(link: Link, meta: Meta | None) -> Pointer:
    """A pointer to what a plan will make."""
    return _make(link, link.new_id(), meta)


def transfer(pointers: Sequence[Pointer], to: Link) -> list[Pointer]:
    """Copies on another worker, leaves of their own; what is on one worker travels together."""
    made: list[Pointer] = []
    bundles: dict[Link, tuple[list[int], list[int]]] = {}
    for pointer in pointers:
        meta, handle = pointer._known(), pointer._handle
        id = to.new_id()
        ids, names = bundles.setdefault(handle.link, ([], []))
        ids.append(handle.id)
        names.append(id)
        made.append(make_pointer(to, id, meta.shape, meta.dtype, requires_grad=meta.requires_grad))
    for link, (ids, names) in bundles.items():
        link.transfer(ids, to, names)
    return made


def make_sent(
    link: Link, tensor: torch.Tensor, *, lasting: bool = False, sealed: bool = False
) -> Pointer:
    """Send a local tensor; the pointer to it is a leaf with the same ``requires_grad``.

    One that lasts is never changed any more, so it need not be copied. Of a sealed one a strict
    worker keeps a copy that stays as it came.
    """
    id = link.new_id()
    link.store(id, tensor, tensor.requires_grad, capture_site(), lasting=lasting, sealed=sealed)
    return make_pointer(link, id, tensor.shape, tensor.dtype, requires_grad=tensor.requires_grad)


calls.register(Pointer, _make)
#: What needs no operation on the worker.
_ANSWERED: Final[dict[Callable[..., Any], Callable[..., Any]]] = {
    **LOCAL,
    torch.autograd.backward: backward,
    torch.autograd.grad: grad,
}
