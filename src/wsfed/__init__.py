"""PyTorch on other people's machines.

Workers hold tensors that must not move. A client writes ordinary PyTorch against pointers to
them, awaits what it needs, and trains models over many workers.

::

    async with wsfed.connect("ws://127.0.0.1:8777") as bob:
        x = bob.send(torch.ones(3))     # nothing waits
        print(await (x + 1))            # but for a value

Importing this package changes nothing in torch, and loads it only when it is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from wsfed.client.dataset import RemoteDataset
    from wsfed.client.hub import HubClient, HubEvent, HubNode, hub
    from wsfed.client.runs import DatasetRun, Progress
    from wsfed.client.virtual import VirtualWorker
    from wsfed.client.worker import Worker, connect
    from wsfed.errors import (
        AuthenticationFailed,
        BudgetSpent,
        Cancelled,
        ConnectionLost,
        ConstantTooLarge,
        DatasetError,
        DeadlineExceeded,
        EnrolmentRefused,
        FederatedError,
        GetNotPermitted,
        LocalProtocolError,
        NodeUnavailable,
        NotCollocated,
        NotFound,
        OpNotAllowed,
        PlanError,
        PointerError,
        PrivacyBudgetSpent,
        ProtocolError,
        QuotaExceeded,
        RemoteError,
        RemoteProtocolError,
        SecAggAborted,
        SessionLost,
        TooFewNodes,
        TooFewSites,
        UpdateRejected,
        ValueNeeded,
        WsfedError,
    )
    from wsfed.node import Node
    from wsfed.pointers.modules import copy, get, move, send
    from wsfed.pointers.plan import Plan, load_plan, plan
    from wsfed.pointers.pointer import Pointer
    from wsfed.worker.datasets import Dataset

__version__ = "0.1.0"

__all__ = [
    "AuthenticationFailed",
    "BudgetSpent",
    "Cancelled",
    "ConnectionLost",
    "ConstantTooLarge",
    "Dataset",
    "DatasetError",
    "DatasetRun",
    "DeadlineExceeded",
    "EnrolmentRefused",
    "FederatedError",
    "GetNotPermitted",
    "HubClient",
    "HubEvent",
    "HubNode",
    "LocalProtocolError",
    "Node",
    "NodeUnavailable",
    "NotCollocated",
    "NotFound",
    "OpNotAllowed",
    "Plan",
    "PlanError",
    "Pointer",
    "PointerError",
    "PrivacyBudgetSpent",
    "Progress",
    "ProtocolError",
    "QuotaExceeded",
    "RemoteDataset",
    "RemoteError",
    "RemoteProtocolError",
    "SecAggAborted",
    "SessionLost",
    "TooFewNodes",
    "TooFewSites",
    "UpdateRejected",
    "ValueNeeded",
    "VirtualWorker",
    "Worker",
    "WsfedError",
    "__version__",
    "connect",
    "copy",
    "get",
    "hub",
    "load_plan",
    "move",
    "plan",
    "send",
]

_HOMES: Final = {
    "Dataset": "wsfed.worker.datasets",
    "DatasetRun": "wsfed.client.runs",
    "HubClient": "wsfed.client.hub",
    "HubEvent": "wsfed.client.hub",
    "HubNode": "wsfed.client.hub",
    "Node": "wsfed.node",
    "Plan": "wsfed.pointers.plan",
    "Pointer": "wsfed.pointers.pointer",
    "Progress": "wsfed.client.runs",
    "RemoteDataset": "wsfed.client.dataset",
    "VirtualWorker": "wsfed.client.virtual",
    "Worker": "wsfed.client.worker",
    "connect": "wsfed.client.worker",
    "copy": "wsfed.pointers.modules",
    "get": "wsfed.pointers.modules",
    "hub": "wsfed.client.hub",
    "load_plan": "wsfed.pointers.plan",
    "move": "wsfed.pointers.modules",
    "plan": "wsfed.pointers.plan",
    "send": "wsfed.pointers.modules",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        try:
            return import_module(f"wsfed.{name}")
        except ModuleNotFoundError:
            raise AttributeError(f"module 'wsfed' has no attribute {name!r}") from None
    value = getattr(import_module(_HOMES.get(name, "wsfed.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
