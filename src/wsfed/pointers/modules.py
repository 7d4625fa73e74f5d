"""Modules, and lists, tuples and dictionaries of tensors: to a worker, home, and between workers.

A module goes in place: ``torch.utils.swap_tensors`` exchanges what is inside each Parameter and
buffer, so whoever holds one (an optimizer, another module that shares it) holds the right one
afterwards.
"""

from __future__ import annotations

import asyncio
import copy as copy_module
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from wsfed.errors import PointerError
from wsfed.pointers.link import Link, link_of
from wsfed.pointers.pointer import Pointer, make_sent, transfer
from wsfed.pointers.recording import recording_now
from wsfed.pointers.site import capture_site

__all__ = ["copy", "get", "move", "send"]

_OFF = torch._C.DisableTorchFunctionSubclass


def send(value: Any, worker: Any, *, lasting: bool = False) -> Any:
    """Send a tensor, a module, or a list, tuple or dictionary of them. Does not wait.

    Args:
        value: a module is sent in place and returned; gradients that are there go along. What is
            on another worker already is moved.
        worker: where to.
        lasting: a module's values are changed by nobody any more, so they need not be copied.

    Raises:
        TypeError: nothing of it can be sent.
        PointerError: a local backward pass still needs the module's parameters.
        PlanError: it is in a plan, which would send the same values each time.
    """
    if (recording := recording_now()) is not None:
        recording.refuse("sending has no place in it: send before, and hand the pointer over")
    link = link_of(worker)
    if isinstance(value, nn.Module):
        _send_when_made(value, link)
        with _unlocked(value):
            tensors = _tensors(value)
            _check_free(tensors)
            _move_in_place(tensors, link)
            for tensor in tensors:
                _send_in_place(tensor, link, lasting)
        return value
    if isinstance(value, torch.optim.Optimizer):
        raise TypeError("an optimizer needs no sending: its state follows its parameters")
    return _each(value, lambda tensor: _sent(tensor, link))


def get(value: Any, *, grads: bool = True) -> Any:
    """Bring home a pointer, a module, an optimizer's state, or a collection of pointers.

    Args:
        value: a module or an optimizer comes home in place.
        grads: whether the gradients of a module's parameters come, too; without them ``p.grad``
            is ``None`` afterwards, and half the bytes travel.

    Returns:
        An awaitable of the result whose requests have left; in the blocking world the result.
    """
    if isinstance(value, nn.Module):
        if not _tensors(value):
            return _nothing_to_bring(value)
        return _finish(_ask_in_place(_tensors(value), grads), lambda: value)
    if isinstance(value, torch.optim.Optimizer):
        return _get_state(value)
    return _get_each(value)


def _nothing_to_bring(module: nn.Module) -> Any:
    """A module without tensors is at home everywhere."""
    try:
        done = asyncio.get_running_loop().create_future()
    except RuntimeError:  # no event loop: the blocking world
        return module
    done.set_result(module)
    return done


def move(value: Any, worker: Any) -> Any:
    """Move a pointer, a module or a collection of pointers to another worker. Does not wait."""
    link = link_of(worker)
    if isinstance(value, nn.Module):
        return send(value, worker)
    return _each(value, lambda tensor: _pointer(tensor).move(worker), link)


def copy(value: Any, worker: Any = None) -> Any:
    """An independent copy, where it is or on another worker. Does not wait."""
    if isinstance(value, nn.Module):
        made = copy_module.deepcopy(value)
        return made if worker is None else send(made, worker)
    return _each(value, lambda tensor: _pointer(tensor).copy(worker))


# --- collections ---------------------------------------------------------------------------------


def _each(value: Any, work: Callable[[torch.Tensor], Any], *_: Any) -> Any:
    leaves, spec = pytree.tree_flatten(value)
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise TypeError(f"{type(value).__name__} is no tensor, module or collection of tensors")
    made = [work(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(made, spec)


def _sent(tensor: torch.Tensor, link: Link) -> Pointer:
    if isinstance(tensor, Pointer):
        return tensor if tensor._handle.link is link else tensor._transfer(link)
    return make_sent(link, tensor)


def _pointer(tensor: torch.Tensor) -> Pointer:
    if not isinstance(tensor, Pointer):
        raise PointerError("this tensor is local; send it first")
    return tensor


def _get_each(value: Any) -> Any:
    leaves, spec = pytree.tree_flatten(value)
    if not any(isinstance(leaf, Pointer) for leaf in leaves):
        raise TypeError(f"there is no pointer in this {type(value).__name__}")
    site = capture_site()
    links = [leaf._handle.link for leaf in leaves if isinstance(leaf, Pointer)]
    asked = [leaf._fetch(site) for leaf in leaves if isinstance(leaf, Pointer)]

    async def gather() -> Any:
        # All at once: of several failures the first is raised, and no other one is reported lost.
        values = iter(await asyncio.gather(*asked))
        return pytree.tree_unflatten(
            [next(values) if isinstance(leaf, Pointer) else leaf for leaf in leaves], spec
        )

    return links[0].run(gather())


# --- modules -------------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, each once, however often it is shared."""
    found: dict[int, torch.Tensor] = {}
    for each in module.modules():
        for tensor in (*each._parameters.values(), *each._buffers.values()):
            if tensor is not None and not is_lazy(tensor):
                found[id(tensor)] = tensor
    return list(found.values())


def _send_when_made(module: nn.Module, link: Link) -> None:
    """Lazy layers are made here, by their first input, and are sent then."""

    def make(layer: nn.Module, *_: Any) -> None:
        hook.remove()
        send(layer, link)

    for each in module.modules():
        own = (*each._parameters.values(), *each._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in own):
            hook = each.register_forward_pre_hook(make)


@contextmanager
def _unlocked(module: nn.Module) -> Iterator[None]:
    """While this lasts, recurrent layers hold no weak references to their weights."""
    recurrent = [each for each in module.modules() if isinstance(each, nn.RNNBase)]
    for each in recurrent:
        each._flat_weight_refs = []
    try:
        yield
    finally:
        for each in recurrent:
            each._init_flat_weights()


def _check_free(tensors: list[torch.Tensor]) -> None:
    """Whether all of them can be exchanged, before the first one is.

    A graph that has been gone through keeps one reference to a leaf, to add to its gradient; one
    that was not keeps more, for the values it needs.
    """
    for tensor in tensors:
        users: int = tensor._use_count()  # type: ignore[attr-defined]
        if weakref.getweakrefs(tensor) or users > (2 if tensor.is_leaf else 1):
            raise PointerError(_NOT_FREE)


_NOT_FREE = (
    "this module's parameters are part of a local graph (a loss or a hook that is still held) or "
    "weakly referenced, so they cannot be exchanged; drop what holds them first"
)


def _move_in_place(tensors: list[torch.Tensor], link: Link) -> None:
    """What is on other workers, with its gradients."""
    away = [t for t in tensors if isinstance(t, Pointer) and t._handle.link is not link]
    grads = [(each, grad) for each in away if (grad := each.grad) is not None]
    moved = transfer([*away, *(_pointer(grad) for _, grad in grads)], link)
    arrived = dict(zip(map(id, away), moved, strict=False))
    for (each, _), grad in zip(grads, moved[len(away) :], strict=True):
        arrived[id(each)].grad = grad
    for each in away:
        _swap(each, arrived[id(each)])


def _send_in_place(tensor: torch.Tensor, link: Link, lasting: bool) -> None:
    if isinstance(tensor, Pointer):
        return
    with torch.no_grad():
        pointer = make_sent(link, tensor, lasting=lasting)
    _swap(tensor, _with_grad(pointer, tensor.grad, link))


def _with_grad(pointer: Pointer, grad: torch.Tensor | None, link: Link) -> Pointer:
    if grad is not None:
        pointer.grad = _sent(grad, link)
    return pointer


def _swap(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Put into ``tensor`` what is in ``other``, keeping what a program has attached to it."""
    if isinstance(tensor, nn.Parameter):
        if isinstance(other, Pointer):
            other.__dict__["_is_param"] = True
        elif not isinstance(other, nn.Parameter):
            other = _parameter(other)
    for name, value in tensor.__dict__.items():
        if name not in _OWN:
            other.__dict__[name] = value
    try:
        torch.utils.swap_tensors(tensor, other)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise PointerError(f"{_NOT_FREE}: {error}") from None


#: What belongs to a pointer and not to the program.
_OWN = frozenset(
    {
        *("_grad_pointer", "_handle", "_is_param", "_meta", "_node", "_odd", "_seen", "_view_of"),
        "_writes",
    }
)


def _parameter(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=value.requires_grad)


def _ask_in_place(
    tensors: list[torch.Tensor], grads: bool
) -> list[tuple[Pointer, Awaitable[torch.Tensor], Awaitable[torch.Tensor] | None]]:
    asked, site = [], capture_site()
    for tensor in tensors:
        if isinstance(tensor, Pointer):
            grad = tensor.grad if grads else None
            asked.append(
                (
                    tensor,
                    tensor._fetch(site),
                    None if grad is None else _pointer(grad)._fetch(site),
                )
            )
    return asked


def _finish(asked: list[Any], result: Callable[[], Any]) -> Any:
    """Wait for all values, and only then put the first one in its place."""
    if not asked:
        raise PointerError("nothing of this is on a worker")
    link = asked[0][0]._handle.link
    module = result()

    async def bring_home() -> Any:
        came = iter(await asyncio.gather(*(f for _, *both in asked for f in both if f is not None)))
        values = [
            (pointer, next(came), None if grad is None else next(came))
            for pointer, _, grad in asked
        ]
        with _unlocked(module):
            _check_free([pointer for pointer, *_ in values])
            for pointer, value, grad in values:
                requires_grad = pointer._known().requires_grad and pointer._known().is_leaf
                home = value.detach().requires_grad_(requires_grad)
                home.grad = grad
                _swap_home(pointer, home)
        return module

    return link.run(bring_home())


def _swap_home(pointer: Pointer, value: torch.Tensor) -> None:
    if not isinstance(pointer, nn.Parameter):
        _swap(pointer, value)
        return
    home = _parameter(value)
    home.grad = value.grad
    _swap(pointer, home)


def _get_state(optimizer: torch.optim.Optimizer) -> Any:
    places = [
        (state, name)
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Pointer)
    ]
    if not places:
        raise PointerError("nothing of this optimizer's state is on a worker")
    site = capture_site()
    asked = [(state, name, state[name]._fetch(site)) for state, name in places]
    link = places[0][0][places[0][1]]._handle.link

    async def bring_home() -> torch.optim.Optimizer:
        values = await asyncio.gather(*(future for *_, future in asked))
        for (state, name, _), value in zip(asked, values, strict=True):
            state[name] = value
        return optimizer

    return link.run(bring_home())
