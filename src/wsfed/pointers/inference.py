"""What an operation gives, found out by running it on tensors that are here.

On meta tensors first, which have no values and cost no memory. Where torch has no meta kernel, or
the operation looks at values, once more on small *examples*: ones and zeros of the right shapes.
They tell how many tensors come, and of what dtype. That their shapes are those of the real results
is known of some operations (:data:`_SAME_AS_EXAMPLE`); of the others the worker is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

from wsfed.pointers.shapes import TENSOR, Inferred, Meta, intern_meta, meta_of

__all__ = ["UnknownShape", "infer"]

_OFF = torch._C.DisableTorchFunctionSubclass
#: Elements of all arguments up to which examples have the shapes of the real ones.
_FEW: Final = 1_000_000
#: Sizes in examples of larger ones; equal sizes stay equal.
_MOST: Final = 8
_WRONG: Final = (RuntimeError, ValueError, IndexError, TypeError)


class UnknownShape(Exception):
    """The results depend on values, even in their number."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: torch's function, its arguments, and the metadata of the tensors among them."""

    name: str
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    metas: Sequence[Meta]
    values: Mapping[int, torch.Tensor]

    def run(self, tensors: Sequence[torch.Tensor], device: torch.device) -> Any:
        """Call the function with these tensors in the places of its own."""
        give = iter(tensors)
        args = [_replace(arg, give, device) for arg in self.args]
        kwargs = {
            name: device
            if name == "device" and value is not None
            else _number(name, _replace(value, give, device))
            for name, value in self.kwargs.items()
        }
        if self.function is torch.Tensor.to:
            args[1:] = [device if isinstance(arg, str) else arg for arg in args[1:]]
        elif self.function is torch.full_like and len(args) > 1:
            args[1] = _number("fill_value", args[1])
        if self.name.endswith("ctc_loss"):
            _give_lengths(args, kwargs)
        with _OFF():
            return self.function(*args, **kwargs)


def infer(
    name: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    metas: Sequence[Meta],
    values: Mapping[int, torch.Tensor],
    kind: str = "meta",
) -> Inferred:
    """What a call gives.

    Args:
        name: on the wire.
        function: torch's.
        args: with tensors in their places.
        kwargs: likewise.
        metas: of the tensors, in the order in which they are met.
        values: local tensors whose values tell the shape, by their place among these.
        kind: the worker's type of device where it decides (autocast has rules for each), else
            ``"meta"``.

    Raises:
        UnknownShape: the number of results depends on values.
        Exception: torch's own, for a wrong call.
    """
    call = _Call(name, function, args, kwargs, metas, values)
    if name in _WRONG_META and _are_few(metas):
        return _by_example(call, "")
    if kind != "meta":
        from torch._subclasses import fake_tensor  # takes a second to import

        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            return _by_shadows(call, kind, fake_tensor.DataDependentOutputException)
    return _by_shadows(call, kind)


def _by_shadows(call: _Call, kind: str, *looked: type[Exception]) -> Inferred:
    """From tensors without values: meta ones, or torch's fake ones of another type of device.

    ``looked``: what else is raised where the operation looks at values.
    """
    values, device = call.values, torch.device(kind)
    shadows = [values.get(place, _shadow(meta, device)) for place, meta in enumerate(call.metas)]
    before = _State(shadows)
    try:
        result = call.run(shadows, device)
    except _WRONG as error:
        # Some of torch's functions look at values and raise a plain RuntimeError that names the
        # meta tensor; there is nothing but its text to tell it by.
        if isinstance(error, (NotImplementedError, *looked)) or "meta tensor" in str(error):
            return _by_example(call, str(error))
        if values:
            raise  # the values of others, which are not here, would make another error
        raise (_usual_error(call) or error) from None
    with _OFF():
        inferred = _read(result, shadows, before, known=True, tells=call.name in _TELLING)
    if call.name in _UNDEFINED:
        return _without_undefined(inferred, result, shadows)
    return inferred


# --- examples -------------------------------------------------------------------------------------


def _by_example(call: _Call, why: str) -> Inferred:
    cpu = torch.device("cpu")
    for whole, fraction in ((0, 1.0), (1, 1.0), (1, None)):
        examples = _examples(call.metas, whole, fraction)
        before = _State(examples)
        try:
            with torch.random.fork_rng(devices=[]):
                result = call.run(examples, cpu)
        except _WRONG:
            continue
        with _OFF():
            known = call.name in _SAME_AS_EXAMPLE and _are_few(call.metas)
            inferred = _read(result, examples, before, known=known)
        return _without_undefined(inferred, result, examples)
    if call.name == "torch.Tensor.__getitem__":  # a mask beside other indices fits no example
        unknown = intern_meta((0,), (1,), call.metas[0].dtype, False, True)
        parents = ((0,) if call.metas[0].requires_grad and torch.is_grad_enabled() else (),)
        return Inferred((unknown,), (-1,), parents, (), (), None, known=False)
    raise UnknownShape(why)


def _usual_error(call: _Call) -> Exception | None:
    """What torch says of a wrong call on the CPU; meta kernels word some errors otherwise."""
    if not _are_few(call.metas):
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            call.run(_examples(call.metas, 0, 0.0), torch.device("cpu"))
    except _WRONG as usual:
        return usual
    return None


def _are_few(metas: Sequence[Meta]) -> bool:
    return sum(map(_extent, metas)) <= _FEW


def _examples(metas: Sequence[Meta], whole: int, fraction: float | None) -> list[torch.Tensor]:
    """Tensors full of these numbers; ``None``: of fractions that make matrices of full rank."""
    few = _are_few(metas)
    made = []
    for meta in metas:
        filling = fraction if meta.dtype.is_floating_point or meta.dtype.is_complex else whole
        shape = meta.shape if few else tuple(min(size, _MOST) for size in meta.shape)
        extent = _extent(meta) if few else math.prod(shape)
        memory = torch.full((extent,), filling or 0, dtype=meta.dtype)
        if filling is None:
            memory += torch.arange(extent).square().sin()
        example = memory.as_strided(shape, meta.stride).data if few else memory.view(shape).data
        if meta.requires_grad:
            example.requires_grad_()
            if not meta.is_leaf:
                with torch.enable_grad():
                    example = example * 1
        made.append(example)
    return made


def _extent(meta: Meta) -> int:
    """Elements of the memory that a tensor spans, at least one."""
    reach = sum((size - 1) * step for size, step in zip(meta.shape, meta.stride, strict=True))
    return max(1 + reach, 1)


# --- reading a result -----------------------------------------------------------------------------


class _State:
    """What a call may change about its arguments."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.metas = [meta_of(each) for each in tensors]
        self.versions = [_version(each) for each in tensors]
        with torch.enable_grad():
            self.nodes = [each.grad_fn for each in tensors]


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to; tensors of inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def _read(
    result: Any,
    given: Sequence[torch.Tensor],
    before: _State,
    *,
    known: bool,
    tells: bool = False,
) -> Inferred:
    leaves, spec = pytree.tree_flatten(result)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    places = {id(each): place for place, each in reversed(list(enumerate(given)))}
    roots = {id(_root(each)): place for place, each in reversed(list(enumerate(given)))}
    sources = _sources(given, before)
    after = [meta_of(each) for each in given]
    return Inferred(
        outs=tuple(
            places.get(id(t), t if tells and not t.is_meta else meta_of(t)) for t in tensors
        ),
        views=tuple(roots.get(id(_root(t)), -1) if t._is_view() else -1 for t in tensors),
        parents=tuple(_reached(t, sources) for t in tensors),
        changed=tuple(
            (place, meta, _reached(given[place], sources))
            for place, meta in enumerate(after)
            if meta is not before.metas[place]
        ),
        written=tuple(
            (place, _reached(each, sources))
            for place, each in enumerate(given)
            if _version(each) != before.versions[place]
        ),
        spec=None
        if isinstance(result, torch.Tensor)
        else ([TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec),
        known=known,
    )


def _without_undefined(inferred: Inferred, result: Any, given: Sequence[torch.Tensor]) -> Inferred:
    """The same without the parents to which torch gives no gradient, although it could."""
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    parents = [
        _defined(tensor, places, given) if places else ()
        for tensor, places in zip(tensors, inferred.parents, strict=True)
    ]
    return replace(inferred, parents=tuple(parents))


def _defined(
    tensor: torch.Tensor, places: tuple[int, ...], given: Sequence[torch.Tensor]
) -> tuple[int, ...]:
    try:
        gradients = torch.autograd.grad(
            tensor,
            [given[place] for place in places],
            torch.ones_like(tensor),
            retain_graph=True,
            allow_unused=True,
        )
    except _WRONG:
        return places
    return tuple(
        place for place, gradient in zip(places, gradients, strict=True) if gradient is not None
    )


def _root(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor._base is None else tensor._base


def _sources(given: Sequence[torch.Tensor], before: _State) -> dict[Any, int]:
    """The arguments' places by what stands for them in the graph: their node, or the leaf."""
    found: dict[Any, int] = {}
    for place, (tensor, node) in enumerate(zip(given, before.nodes, strict=True)):
        if node is not None:
            found.setdefault(node, place)
        elif before.metas[place].requires_grad:
            found.setdefault(id(tensor), place)
    return found


def _reached(tensor: torch.Tensor, sources: Mapping[Any, int]) -> tuple[int, ...]:
    """The places of the arguments that a backward pass from here comes to."""
    if not sources or not tensor.requires_grad or tensor.grad_fn is None:
        return ()
    found, seen = set[int](), set[Any]()
    pending: list[Any] = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        place = sources.get(node if leaf is None else id(leaf))
        if place is not None:
            found.add(place)
        else:
            pending.extend(following for following, _ in node.next_functions)
    return tuple(sorted(found))


# --- arguments ------------------------------------------------------------------------------------


def _shadow(meta: Meta, device: torch.device) -> torch.Tensor:
    """A tensor without values, with this metadata, with a graph of its own where it is no leaf."""
    if not meta.requires_grad or meta.is_leaf:
        made = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=device)
        return made.requires_grad_(meta.requires_grad)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), dtype=meta.dtype, device=device, requires_grad=True)
        if any(step == 0 and size > 1 for size, step in zip(meta.shape, meta.stride, strict=True)):
            return _expanded(leaf, meta)
        made = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=device)
        return made.copy_(leaf)


def _expanded(leaf: torch.Tensor, meta: Meta) -> torch.Tensor:
    """Elements that share memory cannot be written to, so it has to be a view."""
    memory = leaf.expand(_extent(meta)) * 1
    return memory.as_strided(meta.shape, meta.stride)


def _number(name: str, value: Any) -> Any:
    """``alpha=`` and its like take a tensor for a number, and a meta tensor has none.

    No shape depends on them. torch's L-BFGS computes them, and the worker reads them.
    """
    if name not in ("alpha", "beta", "value", "fill_value") or not isinstance(value, torch.Tensor):
        return value
    if value.ndim or value.requires_grad:
        return value
    return torch.ones((), dtype=value.dtype).item()


def _give_lengths(args: list[Any], kwargs: dict[str, Any]) -> None:
    """Lengths as tensors have no meta kernel, as numbers they do; no shape depends on them."""
    words = ("log_probs", "targets", "input_lengths", "target_lengths")
    given = dict(zip(words, args, strict=False)) | kwargs
    if not all(isinstance(given.get(word), torch.Tensor) for word in words):
        return
    steps, longest, batch = given["log_probs"].shape[0], given["targets"].shape[-1], 1
    if given["log_probs"].ndim == 3:
        batch = given["log_probs"].shape[1]
    whole = given["targets"].ndim == 2 or batch == 1
    lengths = [longest] * batch if whole else [longest, *[0] * (batch - 1)]
    for word, value in (("input_lengths", [steps] * batch), ("target_lengths", lengths)):
        if word in kwargs:
            kwargs[word] = value
        else:
            args[words.index(word)] = value


def _replace(value: Any, give: Iterator[torch.Tensor], device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return next(give)
    if type(value) in (int, float, bool, str, type(None)):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replace(item, give, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_replace(item, give, device) for item in value)
    if isinstance(value, dict):
        return {key: _replace(item, give, device) for key, item in value.items()}
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return slice(*(_replace(part, give, device) for part in parts))
    if isinstance(value, torch.device):
        return device
    return value


def _names(*words: str) -> frozenset[str]:
    return frozenset(f"torch.{word}" for word in words)


#: Operations that give tensors of which local values tell everything: sizes of batches, lengths.
_TELLING: Final = _names("_pack_padded_sequence", "_pad_packed_sequence")
#: Operations that look at values (to check them) or have no meta kernel, and whose shapes do not
#: depend on values.
_NO_META: Final = _names(
    *("Tensor.corrcoef", "Tensor.cov", "Tensor.geqrf", "Tensor.histogram", "Tensor.istft"),
    *("Tensor.narrow", "combinations", "corrcoef", "cov", "functional.istft", "geqrf"),
    *("histogram", "histogramdd", "istft", "narrow", "nn.functional.gaussian_nll_loss"),
)
#: Operations whose meta kernels tell other strides (of two: another shape, another dtype) than
#: the results have.
_WRONG_META: Final = _names(
    *("Tensor.nonzero_static", "Tensor.svd", "fft.hfft2", "fft.hfftn", "fft.rfft2", "fft.rfftn"),
    *("functional.pca_lowrank", "functional.svd_lowrank", "linalg.eig", "linalg.svd"),
    *("native_layer_norm", "nn.functional.multilabel_margin_loss", "nonzero_static", "svd"),
)
_SAME_AS_EXAMPLE: Final = _NO_META | _WRONG_META
#: Operations that give some of their arguments no gradient for some arguments (an order of 0, a
#: size of 0), which the graph does not show.
_UNDEFINED: Final = _names(
    *("Tensor.norm", "functional.norm", "linalg.householder_product", "linalg.norm"),
    *("linalg.vector_norm", "norm", "ormqr", "Tensor.ormqr"),
)
