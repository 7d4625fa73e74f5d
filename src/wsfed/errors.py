"""Every error that wsfed raises, in one tree.

::

    WsfedError
    ├── ConnectionLost          the socket is gone; the session may still be resumed
    │   └── NodeUnavailable         the hub is there, and the node behind it is not
    ├── SessionLost             the worker no longer has (or never had) this session
    ├── AuthenticationFailed    the worker or hub refused the token
    ├── EnrolmentRefused        a hub does not take this node
    ├── TooFewNodes             a hub has fewer such nodes than were waited for
    ├── ProtocolError           bytes that do not follow the wire protocol
    │   ├── LocalProtocolError      this side was asked to send them
    │   └── RemoteProtocolError     the peer sent them
    ├── RemoteError             an operation failed on the worker
    │   ├── OpNotAllowed            the operation is not in the worker's table
    │   ├── GetNotPermitted         the value may not leave the worker
    │   │   └── BudgetSpent             a strict worker has released what its owner lets leave
    │   ├── QuotaExceeded           the session's share of memory or objects is used up
    │   ├── DeadlineExceeded        the time given for the work is over
    │   ├── NotFound                no such object, dataset or tag on the worker
    │   └── Cancelled               the command was cancelled before it ran
    ├── NotCollocated           one operation, pointers on two workers
    ├── PointerError            a pointer was used in a way that has no remote meaning
    │   ├── PlanError               a function cannot be recorded, or a plan not be used so
    │   ├── ValueNeeded             Python needs the value now: await or get it first
    │   └── ConstantTooLarge        a local tensor too large to travel along with an operation
    ├── DatasetError            a data file is missing, malformed or unusable
    └── FederatedError          federated training cannot go on; the model is that of the last round
        ├── PrivacyBudgetSpent      another round would spend more than the privacy budget
        ├── SecAggAborted           a round of secure aggregation came to no sum; nothing was learnt
        ├── TooFewSites             a round was closed with fewer replies than it needs
        └── UpdateRejected          what a site reported cannot be used

Data is carried in attributes, and the text is made from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "AuthenticationFailed",
    "BudgetSpent",
    "Cancelled",
    "ConnectionLost",
    "ConstantTooLarge",
    "DatasetError",
    "DeadlineExceeded",
    "EnrolmentRefused",
    "FederatedError",
    "GetNotPermitted",
    "LocalProtocolError",
    "NodeUnavailable",
    "NotCollocated",
    "NotFound",
    "OpNotAllowed",
    "PlanError",
    "PointerError",
    "PrivacyBudgetSpent",
    "ProtocolError",
    "QuotaExceeded",
    "RemoteError",
    "RemoteProtocolError",
    "SecAggAborted",
    "SessionLost",
    "TooFewNodes",
    "TooFewSites",
    "UpdateRejected",
    "ValueNeeded",
    "WsfedError",
]


class WsfedError(Exception):
    """The root of every error that wsfed raises."""


class ConnectionLost(WsfedError):
    """The connection to a worker ended, or could not be made.

    Attributes:
        url: where the worker is, or was.
        reason: what the transport said.
        worker: the worker's id, where it had answered before; ``""`` where it never did.
    """

    def __init__(self, url: str, reason: str, worker: str = "") -> None:
        self.url, self.reason, self.worker = url, reason, worker
        what, then = f"no connection to {url}", ""
        if worker:
            what = f"the connection to worker {worker!r} at {url} is lost"
            then = "; what was there is gone with its session: connect again and send it anew"
        super().__init__(f"{what}: {reason}{then}")


class NodeUnavailable(ConnectionLost):
    """A hub cannot connect to a node: it is not there, has left, or does not answer.

    Attributes:
        node: its name at the hub.
        code: ``"no-node"``, ``"left"``, ``"no-answer"``, or another word of the hub's.
    """

    def __init__(self, url: str, reason: str, node: str, code: str, worker: str = "") -> None:
        self.node, self.code = node, code
        super().__init__(url, reason, worker)


class SessionLost(WsfedError):
    """The worker has no such session: it restarted, or the time to live ran out.

    Every pointer of the session is dead; connect again and send the data anew.

    Attributes:
        worker: the worker's id.
        reason: why the session is gone.
    """

    def __init__(self, worker: str, reason: str) -> None:
        self.worker, self.reason = worker, reason
        super().__init__(f"the session on worker {worker!r} is lost: {reason}")


class AuthenticationFailed(WsfedError):
    """A worker or hub refused the token (or asked for one and got none).

    Attributes:
        url: its address.
        reason: its sentence.
    """

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(f"{url} refused the connection: {reason}")


class EnrolmentRefused(WsfedError):
    """A hub does not take this node.

    Attributes:
        url: the hub's address.
        code: a short word, such as ``"taken"`` for a name that another node has.
        reason: the hub's sentence.
    """

    def __init__(self, url: str, code: str, reason: str) -> None:
        self.url, self.code, self.reason = url, code, reason
        super().__init__(f"the hub at {url} does not take this node: {reason}")


class TooFewNodes(WsfedError, TimeoutError):
    """A hub has fewer nodes than were waited for.

    Attributes:
        url: the hub's address.
        wanted: how many.
        tags: that they had to have.
        there: names of those that were there and had them.
        others: names of those that were there and had them not.
    """

    def __init__(
        self,
        url: str,
        wanted: int,
        tags: Sequence[str],
        there: Sequence[str],
        others: Sequence[str],
        seconds: float,
        more: str = "",
    ) -> None:
        self.url, self.wanted, self.tags = url, wanted, tuple(tags)
        self.there, self.others = tuple(there), tuple(others)
        with_tags = f" with {', '.join(map(repr, self.tags))}" if self.tags else ""
        named = ", ".join(map(repr, self.there[:10])) or "none"
        left = f"; without these tags: {', '.join(map(repr, self.others[:10]))}" if others else ""
        super().__init__(
            f"{wanted} nodes{with_tags} were wanted at {url}, and {len(self.there)} came within "
            f"{seconds:g} s: {named}{left}{more and f' ({more})'}"
        )


class ProtocolError(WsfedError):
    """Bytes or an order of messages that the wire protocol does not allow.

    Attributes:
        code: a short word a program can test, such as ``"malformed"``.
        reason: one sentence.
    """

    def __init__(self, code: str, reason: str) -> None:
        self.code, self.reason = code, reason
        super().__init__(f"{reason} [{code}]")


class LocalProtocolError(ProtocolError):
    """This side was asked to send something that the protocol does not allow."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol does not allow."""


class RemoteError(WsfedError):
    """An operation failed on a worker.

    Attributes:
        worker: id of the worker, ``""`` on the worker itself.
        type: name of the exception's class on the worker, such as ``"RuntimeError"``.
        message: its text; canned when private data was involved.
        op: wire name of the operation, or the command's name.
        shapes: one text an argument tensor, such as ``"float32[2, 3]"``.
        site: ``file:line`` of the user's code that issued the operation, or ``""``.
    """

    advice = ""

    def __init__(
        self,
        message: str,
        *,
        type: str = "",
        op: str = "",
        shapes: Sequence[str] = (),
        worker: str = "",
        site: str = "",
    ) -> None:
        self.message, self.op, self.shapes = message, op, tuple(shapes)
        self.worker, self.site = worker, site
        self.type = type or self.__class__.__name__
        super().__init__(message)

    def __str__(self) -> str:
        call = f"{self.op}({', '.join(self.shapes)})" if self.op else ""
        if self.type != type(self).__name__:  # what Python shows of this class does not tell it
            call = f"{self.type} in {call}" if call else self.type
        place = f"on worker {self.worker!r}" if self.worker else ""
        where = " ".join(part for part in (call, place) if part)
        lines = [f"{where}: {self.message}" if where else self.message]
        if self.site:
            lines.append(f"  issued at {self.site}")
        if self.advice:
            lines.append(f"  {self.advice}")
        return "\n".join(lines)


class OpNotAllowed(RemoteError):
    """The operation is not in the frozen table, or its arguments are not allowed."""


class GetNotPermitted(RemoteError):
    """The value belongs to the owner of the worker and may not leave it."""

    advice = "train on it where it is; only the owner can mark a dataset open"


class BudgetSpent(GetNotPermitted):
    """A strict worker has released of a data set what its owner lets leave."""

    advice = "the owner decides on another budget (wsfed worker --releases … --ledger FILE)"


class QuotaExceeded(RemoteError):
    """The session's share of the worker (bytes, objects) is used up."""

    advice = "drop pointers that are no longer needed, or ask the owner for a larger --max-memory"


class DeadlineExceeded(RemoteError):
    """The time given for the work is over."""


class NotFound(RemoteError):
    """No object, dataset or transfer of that name on the worker, for this session."""


class Cancelled(RemoteError):
    """The command was cancelled before the worker ran it."""


class NotCollocated(WsfedError):
    """One operation met pointers on two workers.

    Attributes:
        op: the operation.
        workers: ids of the workers, in the order they were met; equal for two sessions on one, or
            with two workers of one name.
        site: ``file:line`` of the user's code, or ``""``.
    """

    def __init__(self, op: str, workers: Sequence[str], site: str = "") -> None:
        self.op, self.workers, self.site = op, tuple(workers), site
        names = " and ".join(repr(name) for name in self.workers)
        where = f"on one worker, and they are on {names}; move one of them with .move(worker)"
        if len(set(self.workers)) == 1:
            where = (
                "in one session, and they are in two, each with a worker called "
                f"{self.workers[0]!r}: connect once and use that worker for both, or, if there are "
                "two of that name (wsfed worker --id), move one of them with .move(worker)"
            )
        super().__init__(f"{op} needs its tensors {where}{f' (issued at {site})' if site else ''}")


class PointerError(WsfedError, RuntimeError):
    """A pointer was used in a way that has no remote meaning."""


class ValueNeeded(PointerError):
    """Python needs the value of a pointer now, and it is on the worker.

    It is no ``TypeError``: torch's operators would hide it behind "unsupported operand".

    Attributes:
        wanted: what was asked of the pointer, such as ``"bool()"``.
    """

    def __init__(self, wanted: str, pointer: str, advice: str = "") -> None:
        self.wanted = wanted
        super().__init__(
            f"{wanted} needs the value of {pointer}, which is on the worker; "
            + (
                advice
                or "write `value = await pointer.get()` first, or use wsfed.sync where it is "
                "not your own line that asks (as in LBFGS and Adafactor)"
            )
        )


class PlanError(PointerError):
    """A function cannot be recorded as a plan, or a plan cannot be used like this.

    Attributes:
        plan: name of the plan.
        reason: why not, and what to do.
        site: ``file:line`` of the user's code, or ``""``.
    """

    def __init__(self, plan: str, reason: str, site: str = "") -> None:
        self.plan, self.reason, self.site = plan, reason, site
        super().__init__(f"plan {plan!r}: {reason}{f' (at {site})' if site else ''}")


class ConstantTooLarge(PointerError, ValueError):
    """A local tensor met in a remote operation is too large to travel along unasked.

    Attributes:
        op: the operation.
        nbytes: size of the local tensor in bytes.
        limit: the largest size that travels along, in bytes.
    """

    def __init__(self, op: str, nbytes: int, limit: int) -> None:
        self.op, self.nbytes, self.limit = op, nbytes, limit
        super().__init__(
            f"{op} met a local tensor of {nbytes:,} bytes; above {limit:,} bytes it has to be "
            "sent on purpose: write `pointer = worker.send(tensor)` once and use the pointer"
        )


class DatasetError(WsfedError, ValueError):
    """A data file is missing, malformed, or has not what was asked of it.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class FederatedError(WsfedError):
    """Federated training cannot go on. The model holds what the last finished round made of it.

    Attributes:
        reason: one sentence.
        history: of the rounds that were finished; ``None`` where training had not begun.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.history: Any = None
        super().__init__(reason)


class PrivacyBudgetSpent(FederatedError):
    """Another round would spend more than the privacy budget.

    Attributes:
        epsilon: after that round.
        delta: of the guarantee.
        budget: epsilon that must not be exceeded.
    """

    def __init__(self, epsilon: float, delta: float, budget: float) -> None:
        self.epsilon, self.delta, self.budget = epsilon, delta, budget
        super().__init__(
            f"another round would spend epsilon = {epsilon:.3f} at delta = {delta:g}, and the "
            f"budget is {budget:g}"
        )


class SecAggAborted(FederatedError):
    """A round of secure aggregation came to no sum. Nothing was learnt of any member's values.

    Attributes:
        round: which.
        missing: members that were there before and did not do the step that failed.
    """

    def __init__(self, round: int, reason: str, missing: Sequence[str] = ()) -> None:
        self.round, self.missing = round, tuple(missing)
        told = f" (missing: {', '.join(missing)})" if missing else ""
        super().__init__(f"secure aggregation, round {round}: {reason}{told}")
        self.reason = reason


class TooFewSites(FederatedError):
    """A round was closed with fewer replies than it needs.

    Attributes:
        round: which, from 1.
        replied: how many did.
        needed: how many have to.
        missing: why the others did not, by site.
    """

    def __init__(self, round: int, replied: int, needed: int, missing: Mapping[str, str]) -> None:
        self.round, self.replied, self.needed, self.missing = round, replied, needed, missing
        why = "; ".join(f"{site}: {reason}" for site, reason in missing.items())
        super().__init__(
            f"round {round} has replies of {replied} sites and needs {needed}{why and f' ({why})'}"
        )


class UpdateRejected(FederatedError):
    """What a site reported cannot be used; the model is that of the round before.

    Attributes:
        round: which, from 1.
        site: who.
    """

    def __init__(self, round: int, site: str, reason: str) -> None:
        self.round, self.site = round, site
        super().__init__(f"round {round}: the update of {site!r} cannot be used: {reason}")
