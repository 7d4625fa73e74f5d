"""The vocabulary of PySyft's PointerTensor tutorials, on today's PyTorch.

::

    import torch
    import wsfed.syft as sy

    hook = sy.TorchHook(torch)
    bob = sy.VirtualWorker(hook, id="bob")
    x = torch.tensor([1.0, 2.0]).send(bob)
    print((x + x).get())

``TorchHook`` is what gives tensors and modules their ``send``, ``get`` and ``move``. Importing this
module adds nothing to torch, and ``hook.unhook()`` (or leaving ``with sy.TorchHook(torch)``) takes
away what the hook has added. Everything blocks: no ``await`` is needed, in a notebook or elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, Final

import torch
from torch import nn

from wsfed import sync
from wsfed.client.worker import Worker
from wsfed.errors import PointerError
from wsfed.pointers import modules
from wsfed.pointers.pointer import Pointer
from wsfed.protocol import limits
from wsfed.protocol import messages as m

__all__ = ["TorchHook", "VirtualWorker", "WebsocketClientWorker"]


class TorchHook:
    """Adds ``send``, ``get``, ``move``, ``copy`` and ``location`` to tensors and modules.

    Hooking twice is the same as hooking once; each hook has to be undone before torch is what it
    was.

    Args:
        torch: the torch module.

    Raises:
        AttributeError: torch has something of one of these names already.
    """

    _hooked: ClassVar[list[TorchHook]] = []

    def __init__(self, torch: ModuleType) -> None:
        if not self._hooked:
            for owner, name, _ in _additions():
                if name in vars(owner):
                    raise AttributeError(f"{owner.__name__} has a {name} already")
            for owner, name, value in _additions():
                setattr(owner, name, value)
        self._hooked.append(self)
        self.torch = torch
        self.local_worker = LocalWorker()

    def unhook(self) -> None:
        """Take away what was added. May be called twice."""
        if self not in self._hooked:
            return
        self._hooked.remove(self)
        if not self._hooked:
            for owner, name, _ in _additions():
                delattr(owner, name)

    def __enter__(self) -> TorchHook:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unhook()


class LocalWorker:
    """This program, as the tutorials name it: ``me = hook.local_worker``.

    Attributes:
        id: ``"me"``, which is what ``pointer.owner`` says.
        is_client_worker: tutorials set it; pointers belong to whoever holds them in any case.
    """

    id = "me"
    is_client_worker = True

    def __repr__(self) -> str:
        return "<LocalWorker 'me'>"


class VirtualWorker(sync.VirtualWorker):
    """A worker within this process.

    Args:
        hook: the hook, as in the tutorials; its presence is all that matters.
        id: the worker's name.
    """

    def __init__(self, hook: TorchHook, id: str, **options: Any) -> None:
        _check_hook(hook)
        super().__init__(id, **options)

    @property
    def _objects(self) -> dict[int, torch.Tensor]:
        """What the worker holds, by identifier: the tutorials look at it."""
        self.flush()
        return {id: tensor for each in self._node.objects() for id, tensor in each.items()}

    def clear_objects(self) -> VirtualWorker:
        """Delete everything the worker holds; pointers to it are dead."""
        ids = list(self._objects)
        for start in range(0, len(ids), limits.MAX_IDS):
            self.link.issue(m.Delete(ids[start : start + limits.MAX_IDS]).wire())
        return self


def WebsocketClientWorker(  # noqa: N802 - PySyft's name
    hook: TorchHook,
    host: str = "127.0.0.1",
    port: int = 8777,
    id: str | None = None,
    *,
    url: str | None = None,
    **options: Any,
) -> sync.Worker:
    """A worker process, reached over a WebSocket.

    Args:
        hook: the hook, as in the tutorials.
        host: where it listens.
        port: on which port.
        id: what this program calls it; by default what it calls itself.
        url: instead of host and port.
        options: those of :func:`wsfed.sync.connect`.

    Raises:
        ConnectionLost: nothing answers there.
    """
    _check_hook(hook)
    return sync.connect(url or f"ws://{host}:{port}", id=id, **options)


def _check_hook(hook: object) -> None:
    if not isinstance(hook, TorchHook):
        raise TypeError(
            f"the first argument is the hook, not {type(hook).__name__}: "
            "write hook = sy.TorchHook(torch)"
        )


# --- what the hook adds --------------------------------------------------------------------------


def _send(self: Any, worker: Worker, *more: Worker) -> Any:
    """Send to a worker: a tensor gives a pointer, a module is sent in place."""
    if more:
        raise TypeError("send takes one worker: write [x.send(worker) for worker in workers]")
    if not isinstance(worker, Worker):
        raise TypeError(f"send takes a worker, not {type(worker).__name__}")
    return worker.send(self)


def _module_get(self: nn.Module, *, grads: bool = True) -> nn.Module:
    """Bring a module home, in place."""
    result: nn.Module = modules.get(self, grads=grads)
    return result


def _module_move(self: nn.Module, worker: Worker) -> nn.Module:
    """Move a module from its worker to another, in place."""
    result: nn.Module = modules.move(self, worker)
    return result


def _module_copy(self: nn.Module) -> nn.Module:
    """An independent copy at the same place."""
    result: nn.Module = modules.copy(self)
    return result


def _module_location(self: nn.Module) -> Any:
    """The worker where a module is, or ``None`` at home."""
    pointers = [p for p in (*self.parameters(), *self.buffers()) if isinstance(p, Pointer)]
    return pointers[0].location if pointers else None


def _tensor_get(self: torch.Tensor) -> torch.Tensor:
    """A local tensor has nothing to bring home."""
    raise PointerError("this tensor is here already; only a pointer can be got")


def _additions() -> list[tuple[type, str, Any]]:
    location: Callable[[nn.Module], Any] = _module_location
    return [
        (torch.Tensor, "send", _send),
        (torch.Tensor, "get", _tensor_get),
        (nn.Module, "send", _send),
        (nn.Module, "get", _module_get),
        (nn.Module, "move", _module_move),
        (nn.Module, "copy", _module_copy),
        (nn.Module, "location", property(location)),
    ]


#: What the hook adds, by owner and name; a test compares it with what torch has afterwards.
ADDED: Final = tuple((owner, name) for owner, name, _ in _additions())
