"""``wsfed.plan``: a function of pointers, recorded once, shipped once, then one message a call."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Generic, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils import _pytree as pytree

from wsfed.errors import NotCollocated, PlanError
from wsfed.plans.assembly import assemble
from wsfed.plans.program import Program, made
from wsfed.pointers import files
from wsfed.pointers.calls import mode_now
from wsfed.pointers.effects import Effects, Watch
from wsfed.pointers.kept import (
    Assembled,
    Call,
    Kept,
    Source,
    Step,
    Use,
    names_of,
    settings_of,
    template_of,
)
from wsfed.pointers.pointer import Pointer, make_result
from wsfed.pointers.recording import Part, Recording, recorded, recording_now
from wsfed.pointers.site import Site, StepSites, capture_site, describe_site
from wsfed.pointers.stepping import Stepper, check_held, rates_of

__all__ = ["Plan", "load_plan", "plan"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NO_FUNCTIONS: Final = (
    *(inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction),
)
#: Kinds of calls of which recordings are kept, the last used ones, and recordings of each.
_MOST_KINDS: Final = 64
_MOST_EACH: Final = 8
#: Programs of one plan that are kept.
_MOST_PROGRAMS: Final = 256
#: Conditions to end a run on of which recordings are kept.
_MOST_JUDGED: Final = 8


def plan(function: Callable[_P, _R]) -> Plan[_P, _R]:
    """Record a function of pointers once, and run it with one message a call from then on.

    The function is ordinary PyTorch: layers, losses, ``backward``, an optimizer's ``step``. It is
    run in Python once for each kind of arguments (shapes, dtypes, ``requires_grad``, values of
    what is no tensor) to see what it does; what it does then is a program on the worker. Values
    must not decide which way it goes, and what Python does besides (printing, counting) it does
    only then. An optimizer's learning rate and state are looked at anew at each call.

    Args:
        function: of pointers; it returns pointers, or collections of them.

    Raises:
        TypeError: a coroutine or generator function.
    """
    return Plan(function)


def load_plan(path: str | Path, **owners: Any) -> Plan[..., Any]:
    """Read a plan from a file.

    Args:
        path: of the file.
        owners: what it uses, by the names under which it was saved; sent before it is called.

    Returns:
        A plan for the kinds of calls that were recorded; any other is a ``PlanError``.

    Raises:
        PlanError: the file is damaged or of another version, or an owner is missing or another.
    """
    name, kept, told = files.read(path, owners)

    def function(*args: Any, **kwargs: Any) -> Any:
        why = f"it was loaded from a file, in which there is no such call; there is ({told})"
        raise PlanError(name, why, describe_site(capture_site()))

    function.__name__ = name
    loaded: Plan[..., Any] = Plan(function)
    loaded._kept = kept
    return loaded


class Plan(Generic[_P, _R]):
    """A recorded function; made by :func:`plan`. Call it as the function.

    Raises (when called):
        PlanError: it cannot be recorded, or not be called so; the error names the line.
        NotCollocated: it is given, or has captured, pointers of two workers.
        Exception: the function's own, while it is recorded.
    """

    def __init__(self, function: Callable[_P, _R]) -> None:
        if not callable(function) or any(kind(function) for kind in _NO_FUNCTIONS):
            raise TypeError(
                "a plan is an ordinary function: it is recorded, so nothing waits in it"
            )
        self._function = function
        self.lock = threading.RLock()
        self.name: str = getattr(function, "__name__", type(function).__name__)
        functools.update_wrapper(self, function)
        self._kept: OrderedDict[Any, list[Kept]] = OrderedDict()
        self._programs: dict[Any, Assembled] = {}
        self._unsettled: set[Any] = set()
        self._steppers: dict[torch.optim.Optimizer, Stepper] = {}
        self._judged: dict[Any, Plan[Any, Any]] = {}

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        bound: Plan[..., Any] = Plan(self._function.__get__(instance))
        with contextlib.suppress(AttributeError, TypeError):  # slots
            vars(instance)[self.name] = bound  # found first from now on
        return bound

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Do what the function does. Does not wait."""
        if recording_now() is not None:
            return self._function(*args, **kwargs)
        site = capture_site()
        with self.lock:
            step = self._advance(self._read(args, kwargs, site))
            step.run(site)
        result: _R = step.result
        return result

    def judged(self, until: Callable[[Any], Any]) -> Plan[Any, Any]:
        """The plan that gives ``(result, until(result))``."""
        key = _same_function(until)
        found = self._judged.get(key)
        if found is None:

            def both(*args: Any, **kwargs: Any) -> Any:
                result: Any = self._function(*args, **kwargs)
                return result, until(result)

            if len(self._judged) >= _MOST_JUDGED:
                del self._judged[next(iter(self._judged))]
            found = self._judged[key] = Plan(both)
            found.name = self.name
        return found

    def save(self, path: str | Path, **owners: Any) -> None:
        """Write what it does to a file, from which :func:`wsfed.load_plan` makes a plan again.

        Args:
            path: of the file.
            owners: by name, what it has captured: modules, optimizers and pointers.

        Raises:
            PlanError: it was not recorded yet, or has captured what no owner has.
        """
        files.write(path, self.name, self._kept, owners)

    @property
    def programs(self) -> list[Program]:
        """The programs that it has become so far, one for each kind of call."""
        return [each.program for each in self._programs.values()]

    def __repr__(self) -> str:
        return f"<Plan {self.name!r} of {len(self._programs)} programs>"

    def __str__(self) -> str:
        if not self._programs:
            return f"plan {self.name}: not recorded yet"
        return "\n".join(
            "\n".join([f"plan {self.name} ({each.program.hash[:12]})", *each.lines()])
            for each in self._programs.values()
        )

    def _stepper(self, optimizer: torch.optim.Optimizer) -> Stepper:
        found = self._steppers.get(optimizer)
        if found is None:
            found = self._steppers[optimizer] = Stepper(optimizer)
        return found

    # --- reading a call ---

    def _read(self, args: Any, kwargs: Any, site: Site | None) -> Call:
        key: list[Any] = [mode_now()]
        pointers: list[Pointer] = []
        for value in args:
            self._scan(value, key, pointers, site)
        for word, value in kwargs.items():
            key.append((word,))
            self._scan(value, key, pointers, site)
        link = pointers[0]._handle.link if pointers else None
        for each in pointers:
            if each._handle.link is not link:
                assert link is not None
                names = (link.worker.id, each._handle.link.worker.id)
                raise NotCollocated(f"plan {self.name!r}", names, describe_site(site))
        ids = [each._handle.id for each in pointers]
        key.append(tuple(map(ids.index, ids)))
        return Call(args, kwargs, tuple(key), pointers, ids, link)

    def _scan(self, value: Any, key: list[Any], pointers: list[Pointer], site: Site | None) -> None:
        kind = type(value)
        if isinstance(value, Pointer):
            key.append(value._known())
            pointers.append(value)
        elif isinstance(value, torch.Tensor):
            raise PlanError(
                self.name, "its arguments are pointers: send this tensor first", describe_site(site)
            )
        elif isinstance(value, list | tuple):
            key.append((kind, len(value)))
            for item in value:
                self._scan(item, key, pointers, site)
        elif isinstance(value, dict):
            key.append((kind, *value))
            for item in value.values():
                self._scan(item, key, pointers, site)
        else:
            try:
                hash(value)
            except TypeError:
                raise PlanError(
                    self.name,
                    f"its arguments are no {kind.__name__}, but pointers, numbers, text, and "
                    "lists, tuples and dictionaries of them",
                    describe_site(site),
                ) from None
            # -0.0 is equal to 0.0, and nan to nothing.
            key.append((kind, value.hex() if kind is float else value))

    # --- one step further ---

    def _advance(
        self, call: Call, *, is_next: bool = True, bring: Callable[[], Any] = lambda: None
    ) -> Step:
        """Everything that happens here at a call; what is left is to have the program run.

        Args:
            call: which.
            is_next: whether all that was said before has been sent. If the function raises then,
                it has done what it did until there; else it has done nothing.
            bring: makes what it was called with, where that is not there yet.
        """
        for kept in self._kept.get(call.key, ()):
            if kept.holds(call):
                self._kept.move_to_end(call.key)
                return self._again(kept, call)
        return self._record(call, is_next, bring)

    def _record(self, call: Call, is_next: bool, bring: Callable[[], Any]) -> Step:
        recording, watch = Recording(self.name, call.link), Watch()
        recording.seen = watch.add
        modules: dict[nn.Module, Any] = {}
        try:
            recording.saw(call.pointers)
            with recorded(recording), looking_on(recording, modules):
                result = self._function(*call.args, **call.kwargs)
            return self._finish(call, recording, watch, modules, result)
        except BaseException:
            if is_next:
                bring()
                recording.send_anyway()
            recording.end()
            raise

    def _finish(
        self,
        call: Call,
        recording: Recording,
        watch: Watch,
        modules: dict[nn.Module, Any],
        result: Any,
    ) -> Step:
        """The function has returned: keep what it did."""
        leaves, tree = pytree.tree_flatten(result)
        pointers = [leaf for leaf in leaves if isinstance(leaf, Pointer)]
        made = {each._handle.id: each for each in pointers if recording.is_new(each)}
        for optimizer, rates in recording.rates:
            if rates_of(optimizer) != rates:
                recording.refuse(
                    "it changes what an optimizer is set to, which would happen only while it is "
                    "recorded: do that outside (scheduler.step() behind the call)"
                )
        left = recording.close(set(made) | _hold(recording, list(made.values())))
        is_settled = self._check_settled(
            call, [(id, part) for id, part in left if part.optimizer is None]
        )
        places = {
            id: (number, ordinal)
            for number, part in enumerate(recording.parts)
            for id, ordinal in part.made.items()
        }
        uses = [self._use(part, call, places, recording) for part in recording.parts]
        kept = Kept(
            recording.link,
            call.ids,
            uses,
            [places[id] for id in made],
            dict(recording.metas),
            {id: each for id, each in recording.pointers.items() if id not in call.ids},
            [(each._handle.id, had) for each, had in recording.gradients],
            modules,
            Effects.of(watch, [part.events for part in recording.parts], list(made.values())),
            [template_of(leaf, call, list(made)) for leaf in leaves],
            tree,
        )
        if is_settled:
            variants = self._kept.setdefault(call.key, [])
            variants.insert(0, kept)
            del variants[_MOST_EACH:]
            if len(self._kept) > _MOST_KINDS:
                self._kept.popitem(last=False)
        extra = [(id, places[id]) for id, _ in left]
        outs = [*made, *(id for id, _ in extra)]
        wanted = [*kept.wanted, *(place for _, place in extra)]
        return self._step(kept, recording, uses, wanted, outs, pointers, result)

    def _check_settled(self, call: Call, left: Sequence[tuple[int, Part]]) -> bool:
        """What is kept outside is normal the first time (a cache that is filled), and no other."""
        if not left:
            self._unsettled.discard(call.key)
            return True
        if call.key not in self._unsettled:
            self._unsettled.add(call.key)
            return False
        id, part = left[0]
        site = next(
            s for s, command in zip(part.sites, part.raw, strict=True) if id in made(command)
        )
        raise PlanError(
            self.name,
            "a tensor that is made in it is kept outside of it: return it instead",
            describe_site(site),
        )

    def _use(
        self,
        part: Part,
        call: Call,
        places: dict[int, tuple[int, int]],
        recording: Recording,
    ) -> Use:
        sources: list[Source] = []
        for id in part.captures:
            if id in places and part.optimizer is not None:
                raise PlanError(
                    self.name, "an optimizer steps on what is made in it; make it before"
                )
            if id in places:
                sources.append(("made", places[id]))
            elif part.optimizer is not None:
                sources.append(("step", None))
            elif id in call.ids:
                sources.append(("argument", call.ids.index(id)))
            else:
                sources.append(("captured", id))
        ids = [id for id, (kind, _) in zip(part.captures, sources, strict=True) if kind != "made"]
        metas = [
            None if kind == "made" else recording.metas[id]
            for id, (kind, _) in zip(part.captures, sources, strict=True)
        ]
        return Use(part, sources, tuple(metas), ids)

    def _again(self, kept: Kept, call: Call) -> Step:
        link = kept.link_for(call)
        pointers = {**kept.pointers, **dict(zip(kept.ids, call.pointers, strict=True))}
        again = kept.effects.begin(pointers)
        recording = Recording(self.name, link)
        recording.parts = []
        uses: list[Use] = []
        left: list[tuple[int, tuple[int, int]]] = []
        try:
            for number, use in enumerate(kept.uses):
                if use.part.optimizer is None:
                    uses.append(use.again(pointers, call))
                    again.part(number)
                else:
                    fresh = self._stepper(use.part.optimizer).step(recording)
                    uses.append(fresh)
                    left += [
                        (id, (number, ordinal))
                        for id, ordinal in fresh.part.made.items()
                        if id in recording.alive
                    ]
        except BaseException:  # what comes before the step runs, as it would without a plan
            self._step(kept, recording, uses, [], [], [], None).run(capture_site())
            raise
        forms = kept.effects.made[: len(kept.wanted)]
        results = [make_result(link, form.meta) for form in forms]
        again.end(results)
        outs = [*(each._handle.id for each in results), *(id for id, _ in left)]
        wanted = [*kept.wanted, *(place for _, place in left)]
        return self._step(kept, recording, uses, wanted, outs, results, kept.build(results, call))

    def _step(
        self,
        kept: Kept,
        recording: Recording,
        uses: list[Use],
        wanted: list[tuple[int, int]],
        outs: list[int],
        pointers: Sequence[Pointer],
        result: Any,
    ) -> Step:
        key = (tuple([use.key for use in uses]), tuple(wanted))
        found = self._programs.get(key)
        if found is None:
            pieces = [use.piece() for use in uses]
            program, sites = assemble(pieces, wanted, [use.part.sites for use in uses])
            if len(self._programs) >= _MOST_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            names = names_of([id for use in uses for id in use.ids], kept, self._function)
            found = self._programs[key] = Assembled(program, StepSites(self.name, sites), names)
        return Step(
            found,
            kept,
            recording,
            [id for use in uses for id in use.ids],
            [number for use in uses for number in use.part.numbers],
            outs,
            pointers,
            result,
        )


def _same_function(function: Callable[..., Any]) -> Any:
    """Equal for functions that do the same: a lambda is a new one each time."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    key = (code, tuple(cell.cell_contents for cell in cells or ()))
    try:
        hash(key)
    except TypeError:
        return function
    return function if code is None or getattr(function, "__defaults__", None) else key


def _hold(recording: Recording, results: Sequence[Pointer]) -> set[int]:
    """What only bookkeeping holds: the roots of views. Gradients that were looked at are let go."""
    states = [each.__dict__ for each in (*results, *recording.pointers.values())]
    roots = [state["_view_of"] for state in states if state.get("_view_of") is not None]
    for state in (*states, *roots):
        state.pop("_grad_pointer", None)
    return {root["_handle"].id for root in roots if "_handle" in root}


# --- looking on while a function is recorded ------------------------------------------------------


@contextmanager
def looking_on(recording: Recording, modules: dict[nn.Module, Any]) -> Iterator[None]:
    """See which modules are called and which optimizers step, in this task or thread."""

    def is_ours() -> bool:
        return recording_now() is recording

    def call(module: nn.Module, *_: Any) -> None:
        if is_ours():
            modules.setdefault(module, settings_of(module))

    def begin(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_ours():
            return
        if len(args) > 1 or kwargs.get("closure") is not None:
            recording.refuse("step() takes no closure in a plan: call backward() before it")
        check_held(optimizer, recording)
        recording.begin_step(optimizer)

    def end(optimizer: Any, *_: Any) -> None:
        if is_ours():
            recording.end_step()
            recording.rates.append((optimizer, rates_of(optimizer)))

    handles: list[Any] = [
        register_module_forward_pre_hook(call),
        register_optimizer_step_pre_hook(begin),
        register_optimizer_step_post_hook(end),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
