"""Plans in files: data that says what a plan does, and by which names it finds what it captured.

No code is in it. What the function captured is named by what was given to ``save``: a parameter by
its module and its name there, an optimizer by its own name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgpack
import torch
from torch import nn
from torch.utils import _pytree as pytree

from wsfed.errors import PlanError
from wsfed.plans.program import Constant, Spec, check_command
from wsfed.pointers.effects import Effects, Gradient, Marked, NodeForm, Retained, StateForm
from wsfed.pointers.kept import Kept, Use, settings_of
from wsfed.pointers.recording import Part
from wsfed.pointers.shapes import Meta, intern_meta
from wsfed.pointers.site import capture_site, describe_site
from wsfed.tensors import DTYPE_NAMES, DTYPES, describe

__all__ = ["read", "write"]

_FORMAT: Final = "wsfed plan 1"
_COLLECTIONS: Final[Mapping[str, type]] = MappingProxyType(
    {"list": list, "tuple": tuple, "dict": dict}
)
_PLAIN: Final = (bool, int, float, str, type(None))
_EVENTS: Final = (Marked, Gradient, Retained)


def write(
    path: str | Path, plan: str, recorded: Mapping[Any, list[Kept]], owners: Mapping[str, Any]
) -> None:
    """Write what a plan does.

    Args:
        path: of the file.
        plan: its name.
        recorded: what it did, by the kind of call.
        owners: by name, what it has captured: modules, optimizers and pointers.

    Raises:
        PlanError: it was not recorded yet, or has captured what no owner has.
    """
    names = _Names(plan, owners)
    pairs = [(key, each) for key, variants in recorded.items() for each in variants]
    if not pairs:
        raise PlanError(plan, "it was not recorded yet: call it once", _here())
    kinds = [[_key(item, names) for item in key] for key, _ in pairs]
    content = msgpack.packb([plan, kinds, [_kept(each, names) for _, each in pairs]])
    Path(path).write_bytes(msgpack.packb([_FORMAT, sha256(content).digest(), content]))


def read(
    path: str | Path, owners: Mapping[str, Any]
) -> tuple[str, OrderedDict[Any, list[Kept]], str]:
    """Read what a plan does.

    Returns:
        Its name, what it did by the kind of call, and these kinds for people.

    Raises:
        PlanError: the file is damaged or of another version, or an owner is missing or another.
    """
    try:
        version, digest, content = msgpack.unpackb(Path(path).read_bytes())
    except (ValueError, TypeError) as error:
        raise PlanError(str(path), f"this is no plan ({type(error).__name__})", _here()) from None
    if version != _FORMAT:
        raise PlanError(str(path), f"this is no plan of the format {_FORMAT!r}", _here())
    if type(content) is not bytes or sha256(content).digest() != digest:
        raise PlanError(str(path), "the file is damaged", _here())
    kept: OrderedDict[Any, list[Kept]] = OrderedDict()
    try:
        name, kinds, recorded = msgpack.unpackb(content, strict_map_key=False)
        names = _Names(name, owners)
        for key, each in zip(kinds, recorded, strict=True):
            kept.setdefault(_read_key(key, names), []).append(_read_kept(each, names))
    except PlanError:
        raise
    except Exception as error:  # made by something else than save(): wrong in any way
        why = f"it cannot be read ({type(error).__name__}: {error})"
        raise PlanError(str(path), why, _here()) from None
    names.check()
    return name, kept, "; ".join(dict.fromkeys(map(_kind_of, kept)))


def _here() -> str:
    return describe_site(capture_site())


class _Names:
    """What a plan has captured, by name and back."""

    def __init__(self, plan: str, owners: Mapping[str, Any]) -> None:
        self._plan = plan
        self._by_name: dict[str, Any] = {}
        for owner, value in owners.items():
            self._by_name[owner] = value
            if isinstance(value, nn.Module):
                for name, module in value.named_modules():
                    self._by_name[f"{owner}:{name}"] = module
                for name, tensor in (*value.named_parameters(), *value.named_buffers()):
                    self._by_name[f"{owner}/{name}"] = tensor
        self._by_id = {id(value): name for name, value in self._by_name.items()}
        self._owners = dict(owners)
        self._used: set[str] = set()

    def of(self, value: Any) -> str:
        """The name of a module, an optimizer or a pointer."""
        found = self._by_id.get(id(value))
        if found is None:
            what = "a pointer" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise PlanError(
                self._plan,
                f"it has captured {what} that belongs to nothing given here: name its owner, as in "
                "save(path, model=model, optimizer=optimizer)",
                _here(),
            )
        return found

    def find(self, name: str) -> Any:
        """What has this name."""
        if name not in self._by_name:
            owner = name.split("/")[0].split(":")[0]
            what = f"{owner}=…" if owner not in self._by_name else f"a {name!r}"
            raise PlanError(self._plan, f"it needs {what}, as it was saved with", _here())
        self._used.add(name.split("/")[0].split(":")[0])
        return self._by_name[name]

    def find_like(self, name: str, meta: Meta) -> Any:
        """What has this name, if it is like what was saved."""
        found = self.find(name)
        if (tuple(found.shape), found.dtype) != (meta.shape, meta.dtype):
            was = f"{DTYPE_NAMES[meta.dtype]}{list(meta.shape)}"
            why = f"{name!r} is {describe(found)}, and was {was} when it was saved"
            raise PlanError(self._plan, why, _here())
        return found

    def find_optimizer(self, name: str, kind: str) -> Any:
        """The optimizer of this name, if it is of this kind, over parameters that are here."""
        found = self.find(name)
        if type(found).__name__ != kind:
            why = f"{name!r} is a {type(found).__name__}, and was a {kind} when it was saved"
            raise PlanError(self._plan, why, _here())
        here = {id(value) for value in self._by_name.values()}
        if not all(id(p) in here for group in found.param_groups for p in group["params"]):
            why = f"{name!r} is over other parameters than those that are given here"
            raise PlanError(self._plan, why, _here())
        return found

    def check(self) -> None:
        """Whether everything that was given is used."""
        if unknown := sorted(set(self._owners) - self._used):
            raise PlanError(self._plan, f"it was not saved with {unknown[0]}=…", _here())


# --- forms ----------------------------------------------------------------------------------------


def _key(item: Any, names: _Names) -> Any:
    """A part of what calls are told apart by."""
    if isinstance(item, Meta):
        return ["meta", _meta(item)]
    if isinstance(item, tuple):
        return ["tuple", [_key(each, names) for each in item]]
    if isinstance(item, type) and item.__name__ in _COLLECTIONS:
        return ["type", item.__name__]
    if isinstance(item, type) and item in _PLAIN:
        return ["plain", item.__name__]
    if isinstance(item, _PLAIN):
        return ["value", item]
    return ["owner", names.of(item)]


def _read_key(raw: list[Any], names: _Names) -> tuple[Any, ...]:
    return tuple(_read_item(each, names) for each in raw)


def _kind_of(key: tuple[Any, ...]) -> str:
    """The pointers that a call is given, for people."""
    metas = [each for each in key if isinstance(each, Meta)]
    return ", ".join(f"{DTYPE_NAMES[meta.dtype]}{list(meta.shape)}" for meta in metas)


def _read_item(raw: Any, names: _Names) -> Any:
    kind, value = raw
    match kind:
        case "meta":
            return _read_meta(value)
        case "tuple":
            return tuple(_read_item(each, names) for each in value)
        case "type":
            return _COLLECTIONS[value]
        case "plain":
            return next(each for each in _PLAIN if each.__name__ == value)
        case "value":
            return value
    return names.find(value)


def _meta(meta: Meta | None) -> Any:
    if meta is None:
        return None
    dtype = DTYPE_NAMES[meta.dtype]
    return [list(meta.shape), list(meta.stride), dtype, meta.requires_grad, meta.is_leaf]


def _read_meta(raw: Any) -> Meta | None:
    if raw is None:
        return None
    shape, stride, dtype, requires_grad, is_leaf = raw
    return intern_meta(tuple(shape), tuple(stride), DTYPES[dtype], requires_grad, is_leaf)


def _kept(kept: Kept, names: _Names) -> Any:
    template = [
        [
            kind,
            names.of(value) if isinstance(value, torch.Tensor) else value,
            isinstance(value, torch.Tensor),
        ]
        for kind, value in kept.template
    ]
    for kind, value, _ in template:
        if kind == "value" and not isinstance(value, _PLAIN):
            raise PlanError(
                "", f"it returns a {type(value).__name__}, which no file holds", _here()
            )
    return [
        kept.ids,
        [_use(use, names) for use in kept.uses],
        kept.wanted,
        [[id, _meta(meta)] for id, meta in kept.metas.items()],
        [[id, names.of(pointer)] for id, pointer in kept.pointers.items()],
        kept.gradients,
        [[names.of(module), settings[0]] for module, settings in kept.modules.items()],
        _effects(kept.effects),
        [_leaf(kind, value, names) for kind, value in kept.template],
        pytree.treespec_dumps(kept.tree),
    ]


def _leaf(kind: str, value: Any, names: _Names) -> Any:
    """A leaf of the result: its kind, its value or name, and whether that is a name."""
    if isinstance(value, _PLAIN):
        return [kind, value, False]
    return [kind, names.of(value), True]


def _read_kept(raw: Any, names: _Names) -> Kept:
    ids, uses, wanted, metas, pointers, gradients, modules, effects, template, tree = raw
    known: dict[int, Meta] = {}
    for id, meta in metas:
        found = _read_meta(meta)
        assert found is not None
        known[id] = found
    return Kept(
        None,
        ids,
        [_read_use(use, names) for use in uses],
        [tuple(place) for place in wanted],
        known,
        {id: names.find_like(name, known[id]) for id, name in pointers},
        [tuple(each) for each in gradients],
        {(found := names.find(name)): _settings(found, given) for name, given in modules},
        _read_effects(effects),
        [(kind, names.find(value) if is_name else value) for kind, value, is_name in template],
        pytree.treespec_loads(tree),
    )


def _settings(module: Any, given: list[Any]) -> tuple[list[Any], list[Any]]:
    """What a module was set to, with the parameters and layers that it has here."""
    return given, settings_of(module)[1]


def _use(use: Use, names: _Names) -> Any:
    part = use.part
    return [
        None
        if part.optimizer is None
        else [names.of(part.optimizer), type(part.optimizer).__name__],
        part.commands,
        part.captures,
        part.numbers,
        [[c.spec.dtype, list(c.spec.shape), c.data] for c in part.constants],
        list(part.made.items()),
        part.key,
        use.sources,
        [_meta(meta) for meta in use.metas],
    ]


def _read_use(raw: Any, names: _Names) -> Use:
    optimizer, commands, captures, numbers, constants, made, key, sources, metas = raw
    part = Part(None if optimizer is None else names.find_optimizer(*optimizer))
    part.commands = [check_command(command) for command in commands]
    part.sites = [None] * len(commands)
    part.captures, part.numbers, part.key = captures, numbers, key
    part.constants = [Constant(Spec(dtype, tuple(shape)), data) for dtype, shape, data in constants]
    part.made = dict(made)
    given = [(kind, tuple(value) if isinstance(value, list) else value) for kind, value in sources]
    return Use(part, given, tuple(map(_read_meta, metas)), [])


def _effects(effects: Effects) -> Any:
    return [
        list(effects.places.items()),
        [[n.retains, n.is_guess, n.parents] for n in effects.nodes],
        list(map(_state, effects.made)),
        [[place, _state(form)] for place, form in effects.changed.items()],
        [[_event(event) for event in part] for part in effects.events],
    ]


def _read_effects(raw: Any) -> Effects:
    places, nodes, made, changed, events = raw
    return Effects(
        dict(places),
        [NodeForm(retains, is_guess, tuple(parents)) for retains, is_guess, parents in nodes],
        list(map(_read_state, made)),
        {place: _read_state(form) for place, form in changed},
        [[_read_event(*event) for event in part] for part in events],
    )


def _state(form: StateForm) -> Any:
    return [_meta(form.meta), form.node, form.writes, form.behind, form.is_odd, form.root]


def _read_state(raw: Any) -> StateForm:
    meta, node, writes, behind, is_odd, root = raw
    return StateForm(
        _read_meta(meta), node, writes, behind, is_odd, None if root is None else tuple(root)
    )


def _event(event: Marked | Gradient | Retained) -> Any:
    fields = [getattr(event, name) for name in type(event).__slots__]
    return [_EVENTS.index(type(event)), fields]


def _read_event(kind: int, fields: list[Any]) -> Any:
    make: Callable[..., Any] = _EVENTS[kind]
    return make(*(tuple(each) if isinstance(each, list) else each for each in fields))
