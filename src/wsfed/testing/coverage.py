"""torch's own test databases, run through pointers and compared with local torch.

::

    with sync.connect("ws://127.0.0.1:8777") as worker:
        for outcome in coverage.operators(worker, most=3):
            print(outcome)

Every sample of ``op_db``, ``module_db`` and ``optim_db`` is run here and on the worker: results
(dtype, shape, strides, ``requires_grad``, ``is_leaf``), what is written into arguments, also
through views, and gradients. They have to be equal bit for bit, or, where local torch does not
repeat itself, within torch's own tolerances. The databases need ``pip install expecttest``.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

from wsfed.errors import OpNotAllowed, PointerError, WsfedError
from wsfed.sync import Worker
from wsfed.testing.comparison import (
    Ran,
    Side,
    compare_bits,
    compare_closely,
    compare_repeated,
    compare_runs,
)

__all__ = ["EXCLUDED", "Outcome", "modules", "operators", "optimizers"]

#: The dtypes that operators are run with, as far as they have them on the CPU.
DTYPES: Final = (torch.float32, torch.complex64, torch.int64, torch.bool, torch.bfloat16)
#: One local call in twelve gives other bits than the one before, depending on its memory.
_UNREPEATABLE: Final = frozenset({"linalg.lstsq"})
_STEPS: Final = 5
_SEED: Final = 42


@dataclass
class Outcome:
    """What came of one entry of a database.

    Attributes:
        name: of the entry.
        passed: how many samples passed, by what was compared.
        failed: the reasons for the others, likewise.
        excluded: why the entry is not run; ``""`` where it is.
    """

    name: str
    passed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)
    excluded: str = ""

    def __str__(self) -> str:
        if self.excluded:
            return f"{self.name}: excluded, {self.excluded}"
        whole = {kind: self.passed.get(kind, 0) + len(self.failed.get(kind, ())) for kind in KINDS}
        counts = [f"{kind} {self.passed.get(kind, 0)}/{n}" for kind, n in whole.items() if n]
        first = next((f" ({said[0]})" for said in self.failed.values() if said), "")
        return f"{self.name}: {', '.join(counts) or 'no samples'}{first}"

    def add(self, kind: str, check: Callable[[], bool]) -> None:
        """Note whether a check passes; one that gives ``False`` had nothing to compare."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ran = check()
        except Exception as error:  # whatever it is, it is what is looked for
            said = f"{type(error).__name__}: {error}".splitlines()
            self.failed.setdefault(kind, []).append(" ".join(said)[:300])
        else:
            if ran:
                self.passed[kind] = self.passed.get(kind, 0) + 1


#: What is compared.
KINDS: Final = ("forward", "backward", "in-place", "out=", "training")

# --- operators -----------------------------------------------------------------------------------


def operators(
    worker: Worker,
    *,
    most: int | None = None,
    names: Iterable[str] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES[:1],
) -> Iterator[Outcome]:
    """Run torch's database of operators, ``op_db``.

    Args:
        worker: a blocking worker.
        most: samples of an operator and dtype; ``None`` for all.
        names: of the entries that are wanted, as ``formatted_name`` gives them; by default all.
        dtypes: of the samples. An operator that has none of them is run with the first it has.
    """
    from torch.testing._internal.common_methods_invocations import op_db

    wanted = None if names is None else set(names)
    for info in op_db:
        if wanted is not None and info.formatted_name not in wanted:
            continue
        outcome = Outcome(info.formatted_name, excluded=EXCLUDED.get(info.name, ""))
        if not outcome.excluded:
            _operator(worker, info, outcome, most, dtypes)
        yield outcome


def _operator(
    worker: Worker, info: Any, outcome: Outcome, most: int | None, dtypes: Sequence[torch.dtype]
) -> None:
    has = info.supported_dtypes("cpu")
    chosen = [dtype for dtype in dtypes if dtype in has]
    if not chosen:
        chosen = [dtype for dtype in (*DTYPES, *sorted(has, key=str)) if dtype in has][:1]
    if not chosen:
        outcome.excluded = "it has no kernel on the CPU"
    for dtype in chosen:
        differentiable = info.supports_autograd and dtype in (
            torch.float32,
            torch.complex64,
            torch.float64,
        )
        samples = info.sample_inputs("cpu", dtype, requires_grad=differentiable)
        for number, sample in enumerate(itertools.islice(samples, most)):
            _sample(worker, info, sample, outcome, differentiable=differentiable)
            if number == 0 and info.supports_out:
                call = _Call(worker, info.get_op(), sample)
                outcome.add("out=", call.check_out)


def _sample(
    worker: Worker, info: Any, sample: Any, outcome: Outcome, *, differentiable: bool
) -> None:
    call = _Call(worker, info.get_op(), sample, info.name in _UNREPEATABLE)
    outcome.add("forward", call.check_forward)
    if differentiable:
        outcome.add("backward", call.check_backward)
    inplace = info.get_inplace()
    if inplace is not None and not sample.broadcasts_input:
        call = _Call(worker, _on_a_copy(inplace), sample)
        outcome.add("in-place", call.check_backward if differentiable else call.check_forward)


def _on_a_copy(inplace: Callable[..., Any]) -> Callable[..., Any]:
    def call(input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, torch.Tensor):
            return inplace(input.clone(), *args, **kwargs)
        return inplace([each.clone() for each in input], *args, **kwargs)

    return call


@dataclass
class _Call:
    """A function and a sample, to be run on both sides."""

    worker: Worker
    function: Callable[..., Any]
    sample: Any
    is_loose: bool = False

    def check_forward(self) -> bool:
        """Results, and what is in the arguments after writing through the views among these."""
        return self._check(backward=False)

    def check_backward(self) -> bool:
        """Results and gradients."""
        return self._check(backward=True)

    def check_out(self) -> bool:
        """``out=`` is refused with a reason, or it does what torch does."""
        side = Side(None, requires_grad=False)
        with _seeded(self.worker):
            expected = self._call(side)
        if not isinstance(expected, torch.Tensor):
            return False
        outs = []
        for send in (None, self.worker.send):
            own = torch.zeros(expected.shape, dtype=expected.dtype)
            outs.append(own if send is None else send(own))
            try:
                with _seeded(self.worker):
                    self._call(Side(send, requires_grad=False), out=outs[-1])
            except (OpNotAllowed, PointerError):
                return True
        compare_bits(outs[1], outs[0], "out")
        return True

    def _check(self, *, backward: bool) -> bool:
        local, remote = self._run(None, backward), self._run(self.worker.send, backward)
        if local.error is not None:
            if remote.error is None:
                raise AssertionError(f"torch raises {type(local.error).__name__}, and nothing came")
            return True
        if remote.error is not None:
            raise remote.error
        if self.is_loose:
            compare_runs(remote, local, compare_closely)
        else:
            compare_repeated(remote, local, lambda shift: self._run(None, backward, shift))
        return True

    def _call(self, side: Side, **more: Any) -> Any:
        given = (self.sample.input, self.sample.args, self.sample.kwargs)
        input, args, kwargs = map(side.give, given)
        return self.function(input, *args, **kwargs, **more)

    def _run(self, send: Any, backward: bool, shift: int = 0) -> Ran:
        side, ran = Side(send, requires_grad=backward, shift=shift), Ran()
        try:
            with _seeded(self.worker):
                ran.results = self._call(side)
            if backward:
                _go_backward(ran.results, send)
                ran.gradients = [own.grad for own in side.own]
            else:
                _write_through(ran.results, side.own)
            ran.arguments = side.own
            self.worker.flush()
        except Exception as error:
            ran.error = error
            _settle(self.worker)
        return ran


@contextlib.contextmanager
def _seeded(worker: Worker) -> Iterator[None]:
    """Both sides draw the same; samples that seed torch themselves seed the worker, too."""
    seed_here = torch.manual_seed

    def seed(number: int) -> torch.Generator:
        worker.manual_seed(number)
        return seed_here(number)

    with torch.random.fork_rng(devices=[]), mock.patch.object(torch, "manual_seed", seed):
        seed(_SEED)
        yield


def _settle(worker: Worker) -> None:
    """Let everything that failed be told, so that the next sample begins anew."""
    while True:
        try:
            worker.flush()
        except WsfedError:
            continue
        return


def _go_backward(results: Any, send: Any) -> None:
    roots = [
        leaf
        for leaf in pytree.tree_leaves(results)
        if isinstance(leaf, torch.Tensor)
        and leaf.requires_grad
        and (leaf.dtype.is_floating_point or leaf.dtype.is_complex)
    ]
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(root.shape, generator=generator).to(root.dtype) for root in roots]
    if roots:
        torch.autograd.backward(roots, [send(g) for g in gradients] if send else gradients)


def _write_through(results: Any, arguments: Sequence[torch.Tensor]) -> None:
    """Write into results that are views, which their arguments see."""
    for leaf in pytree.tree_leaves(results):
        if not isinstance(leaf, torch.Tensor) or any(leaf is each for each in arguments):
            continue
        strides = [
            stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True) if size > 1
        ]
        if 0 in strides or len(set(strides)) < len(strides) or leaf.is_inference():
            continue  # elements may share memory
        if leaf.dtype is torch.bool:
            leaf.logical_not_()
        else:
            leaf.add_(1)


# --- modules -------------------------------------------------------------------------------------


def modules(
    worker: Worker, *, most: int | None = None, names: Iterable[str] | None = None
) -> Iterator[Outcome]:
    """Run torch's database of modules, ``module_db``: training and evaluation.

    Args:
        worker: a blocking worker.
        most: samples of a module and mode; ``None`` for all.
        names: of the entries that are wanted; by default all.
    """
    from torch.testing._internal.common_modules import module_db

    wanted = None if names is None else set(names)
    for info in module_db:
        if wanted is not None and info.name not in wanted:
            continue
        outcome = Outcome(info.name)
        # The random samples of fractional pooling are of 64 bits whatever is asked for.
        dtype = torch.float64 if "Fractional" in info.name else torch.float32
        for training in (True, False) if info.train_and_eval_differ else (True,):
            samples = info.module_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=True, training=training
            )
            for sample in itertools.islice(samples, most):
                if sample.forward_input is not None:
                    run = _Module(worker, info.module_cls, sample, training)
                    outcome.add("training", run.check)
        yield outcome


@dataclass
class _Module:
    """A module and a sample."""

    worker: Worker
    kind: type[nn.Module]
    sample: Any
    training: bool

    def check(self) -> bool:
        """Results, gradients of inputs and parameters, parameters and buffers."""
        local, remote = self._run(None), self._run(self.worker.send)
        if local.error is not None:
            raise local.error
        if remote.error is not None:
            raise remote.error
        compare_repeated(remote, local, lambda shift: self._run(None, shift))
        return True

    def _run(self, send: Any, shift: int = 0) -> Ran:
        side, ran = Side(send, requires_grad=True, shift=shift), Ran()
        made, given = self.sample.constructor_input, self.sample.forward_input
        try:
            with _seeded(self.worker):
                own = Side(None, requires_grad=True)  # sending a module would take them along
                args, kwargs = map(own.give, (made.args, made.kwargs))
                module = self.kind(*args, **kwargs).train(self.training)
                if send:
                    send(module)
            with _seeded(self.worker):
                args, kwargs = map(side.give, (given.args, given.kwargs))
                ran.results = module(*args, **kwargs)
            _go_backward(ran.results, send)
            ran.gradients = [each.grad for each in (*side.own, *module.parameters())]
            ran.arguments = [*side.own, *module.parameters(), *module.buffers()]
            self.worker.flush()
        except Exception as error:
            ran.error = error
            _settle(self.worker)
        return ran


# --- optimizers ----------------------------------------------------------------------------------


def optimizers(
    worker: Worker, *, most: int | None = None, names: Iterable[str] | None = None
) -> Iterator[Outcome]:
    """Run torch's database of optimizers, ``optim_db``: some steps, parameters and state.

    Args:
        worker: a blocking worker.
        most: settings of an optimizer; ``None`` for all.
        names: of the optimizers that are wanted; by default all.
    """
    from torch.testing._internal.common_optimizers import optim_db

    wanted = None if names is None else set(names)
    for info in optim_db:
        kind: Any = info.optim_cls
        name = kind.__name__
        if wanted is not None and name not in wanted:
            continue
        outcome = Outcome(name, excluded=EXCLUDED.get(f"torch.optim.{name}", ""))
        if not outcome.excluded:
            for sample in itertools.islice(info.optim_inputs_func(device="cpu"), most):
                run = _Optimizer(worker, kind, sample.kwargs)
                outcome.add("training", run.check)
        yield outcome


@dataclass
class _Optimizer:
    """An optimizer and its settings."""

    worker: Worker
    kind: type[torch.optim.Optimizer]
    settings: dict[str, Any]

    def check(self) -> bool:
        """Losses, parameters and the optimizer's state after some steps."""
        local, remote = self._run(None), self._run(self.worker.send)
        compare_repeated(remote, local, lambda _: self._run(None))
        return True

    def _run(self, send: Any) -> Ran:
        with _seeded(self.worker):
            model = nn.Sequential(
                nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)
            )
            inputs, targets = torch.randn(6, 5), torch.randn(6, 3)
        if send:
            send(model)
            inputs, targets = send(inputs), send(targets)
        settings = dict(self.settings)
        if isinstance(rate := settings.get("lr"), torch.Tensor):
            settings["lr"] = rate.clone()
        optimizer = self.kind(model.parameters(), **settings)
        losses: list[torch.Tensor] = []

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            return loss

        try:
            for _ in range(_STEPS):
                optimizer.step(closure)  # type: ignore[arg-type]
            self.worker.flush()
        except Exception:
            _settle(self.worker)
            raise
        states = [optimizer.state[parameter] for parameter in model.parameters()]
        return Ran(losses, list(model.parameters()), [_plain(each) for each in states])


def _plain(state: dict[str, Any]) -> Any:
    return [state[name] for name in sorted(state)]


# --- what is not run -----------------------------------------------------------------------------

_UNINITIALISED: Final = "it gives uninitialised or neighbouring memory, maybe another session's"
_UNCHECKED: Final = "its kernel reads beyond its tensors where the numbers it is given are wrong"
_EIGHT_BITS: Final = "its kernel for numbers of 8 bits trusts the sizes it is given"
_INTERNAL: Final = "an operator of torch.ops without the checks of torch's public functions"
_SPARSE: Final = "sparse tensors have no wire form"

#: Entries that are not run, each with its reason, by the name torch gives them.
EXCLUDED: Final = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *("as_strided", "as_strided_copy", "as_strided_scatter", "empty", "empty_like"),
                *("empty_permuted", "empty_strided", "new_empty", "new_empty_strided"),
                *("resize_", "resize_as_"),
            ),
            _UNINITIALISED,
        ),
        **dict.fromkeys(
            (
                *("_batch_norm_with_update", "_native_batch_norm_legit", "_segment_reduce"),
                *("_unsafe_masked_index", "_unsafe_masked_index_put_accumulate"),
                *("native_batch_norm", "torch.ops.aten._batch_norm_with_update"),
            ),
            _UNCHECKED,
        ),
        **dict.fromkeys(
            (
                *("_chunk_cat", "_softmax_backward_data", "_upsample_bilinear2d_aa"),
                *("max_pool2d_with_indices_backward", "native_dropout_backward", "slice"),
                "torch.ops.aten._safe_softmax.default",
            ),
            _INTERNAL,
        ),
        **dict.fromkeys(("torch._scaled_mm", "torch._scaled_mm_v2"), _EIGHT_BITS),
        **dict.fromkeys(
            ("sparse.mm", "sparse.sampled_addmm", "to_sparse", "torch.optim.SparseAdam"), _SPARSE
        ),
    }
)
