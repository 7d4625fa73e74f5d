"""What a pointer answers by itself: metadata, values that Python wants, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from wsfed.errors import OpNotAllowed, PointerError, ValueNeeded
from wsfed.ops import refused
from wsfed.pointers.calls import call, is_pointer, refuse_function
from wsfed.pointers.recording import NO_VALUES, recording_now

__all__ = ["LOCAL"]

_OFF = torch._C.DisableTorchFunctionSubclass
_T: Any = torch.Tensor  # its properties are descriptors, which its stubs do not say


def _metadata(function: Callable[..., Any], wanted: str) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        pointer = args[0] if args else next(iter(kwargs.values()))
        if pointer.__dict__.get("_meta", True) is None:
            raise ValueNeeded(
                wanted,
                repr(pointer),
                "its shape depends on values: write `await pointer.resolve()` first",
            )
        with _OFF():
            return function(*args, **kwargs)

    return answer


def _spoken(name: str) -> str:
    """A wire name as a program says it: ``torch.Tensor.__len__`` is ``len()``."""
    if name.endswith(".__get__"):
        return name.split(".")[-2]
    return name.rsplit(".", 1)[-1].strip("_") + "()"


def _value(function: Callable[..., Any], wanted: str) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        if is_pointer(kwargs.get("out")):
            raise OpNotAllowed("out= takes no pointer here; assign with copy_", op=wanted[:-2])
        first = next(a for a in (*args, *kwargs.values()) if is_pointer(a))
        if (recording := recording_now()) is not None:
            recording.refuse(f"{wanted} needs a value, and {NO_VALUES}")
        if not first._handle.link.blocking:
            raise ValueNeeded(wanted, repr(first))
        here = [a.get().detach() if is_pointer(a) else a for a in args]
        there = {k: a.get().detach() if is_pointer(a) else a for k, a in kwargs.items()}
        return function(*here, **there)

    return answer


def _tensor_split(input: Any, indices_or_sections: Any, dim: int = 0) -> Any:
    """How many results there are depends on the places to cut at."""
    cuts = indices_or_sections
    if is_pointer(cuts):
        if not cuts._handle.link.blocking:
            raise ValueNeeded("torch.tensor_split()", repr(cuts))
        cuts = cuts.get()
    if isinstance(cuts, torch.Tensor):
        cuts = cuts.tolist()
    if not is_pointer(input):
        return torch.tensor_split(input, cuts, dim)
    return call(torch.tensor_split, (input, cuts, dim), {})


def _pack(input: Any, lengths: Any, batch_first: bool) -> Any:
    """How much is packed depends on the lengths."""
    if is_pointer(lengths):
        if not lengths._handle.link.blocking:
            raise ValueNeeded("pack_padded_sequence() of these lengths", repr(lengths))
        lengths = lengths.get()
    if not is_pointer(input):
        return _PACK(input, lengths, batch_first)
    return call(_PACK, (input, lengths, batch_first), {})


_PACK: Final[Callable[..., Any]] = torch._C._VariableFunctions._pack_padded_sequence


def _view_as(input: Any, other: Any) -> Any:
    """A view of a tensor as itself: what torch makes of a Function that gives its argument."""
    if input is other and not torch.is_grad_enabled() and input.requires_grad:
        refuse_function()
    return call(_T.view_as, (input, other), {})


def _on(kind: str) -> Callable[[Any], bool]:
    return lambda pointer: pointer._handle.link.device.type == kind


def _no_pickle(*_: Any, **__: Any) -> Any:
    raise PointerError(
        "a pointer cannot be pickled: it means something in this session only; bring the tensor, "
        "or the whole module with wsfed.get(module), home first"
    )


def _cpu(pointer: Any, *_: Any, **__: Any) -> Any:
    if pointer._handle.link.device.type != "cpu":
        raise PointerError("a pointer stays on its worker's device; write `await pointer.get()`")
    return pointer


def _together(one: Any, other: Any) -> bool:
    """Whether ``one.data = other`` is possible, which a module's ``.double()`` asks."""
    if not (is_pointer(one) and is_pointer(other)):
        return False
    return one._handle.link is other._handle.link


# --- torch.nn.init, whose functions are intercepted whole ----------------------------------------


@torch.no_grad()
def _uniform(tensor: Any, a: float = 0.0, b: float = 1.0, generator: Any = None) -> Any:
    return tensor.uniform_(a, b)


@torch.no_grad()
def _normal(tensor: Any, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Any:
    return tensor.normal_(mean, std)


@torch.no_grad()
def _constant(tensor: Any, val: float) -> Any:
    return tensor.fill_(val)


@torch.no_grad()
def _kaiming_uniform(
    tensor: Any,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Any = None,
) -> Any:
    """He et al. 2015, as torch.nn.init has it: uniform in ±gain·sqrt(3 / fan)."""
    if 0 in tensor.shape:
        return tensor
    fan = nn.init._calculate_correct_fan(tensor, mode)  # type: ignore[arg-type]
    gain = nn.init.calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    bound = 3**0.5 * (gain / fan**0.5)
    return tensor.uniform_(-bound, bound)


@torch.no_grad()
def _eye(*size: Any, out: Any, **_: Any) -> Any:
    """How torch.nn.init.eye_ writes."""
    out.zero_().diagonal().fill_(1)
    return out


def _triplet_margin_with_distance_loss(
    anchor: Any,
    positive: Any,
    negative: Any,
    *,
    distance_function: Callable[[Any, Any], Any] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Any:
    """As torch has it; the distance is computed by a function of the program's, on pointers."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")
    if not anchor.ndim == positive.ndim == negative.ndim:
        raise RuntimeError("anchor, positive and negative need the same number of dimensions")
    distance = distance_function or torch.pairwise_distance
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = torch.minimum(far, distance(positive, negative))
    loss = torch.clamp_min(margin + near - far, 0)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


# --- lists, and memory that nobody has written to -------------------------------------------------


def _each(word: str) -> Callable[..., Any]:
    """``torch._foreach_add_`` and its like, one by one: so the labels of each are known.

    torch's CPU kernels do the same, so that the bits are equal.
    """
    takes_value = word in ("addcdiv_", "addcmul_")

    def one(tensor: Any, *args: Any, **kwargs: Any) -> None:
        if word == "maximum_":
            tensor.clamp_(min=args[0])
        elif word == "minimum_":
            tensor.clamp_(max=args[0])
        elif takes_value and len(args) == 3:
            getattr(tensor, word)(*args[:2], value=args[2], **kwargs)
        else:
            getattr(tensor, word)(*args, **kwargs)

    def answer(tensors: Any, *args: Any, **kwargs: Any) -> None:
        def part(value: Any, place: int) -> Any:
            return value[place] if isinstance(value, list | tuple) else value

        for place, tensor in enumerate(tensors):
            here = [part(value, place) for value in args]
            one(tensor, *here, **{key: part(value, place) for key, value in kwargs.items()})

    return answer


def _empty_like(input: Any, **kwargs: Any) -> Any:
    """What is there may be anything: zeros, for what was there may be another session's."""
    return torch.zeros_like(input, **kwargs)


def _new_empty(input: Any, *size: Any, **kwargs: Any) -> Any:
    return input.new_zeros(*size, **kwargs)


def _found(name: str) -> Callable[..., Any] | None:
    """The function of a wire name, in the installed torch."""
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found if callable(found) else None


def _build() -> dict[Callable[..., Any], Callable[..., Any]]:
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    for name in refused.LOCAL:
        if (function := _found(name)) is not None:
            table[function] = _metadata(function, _spoken(name))
    for name in [f"{space}.{word}" for space in ("torch", "torch.Tensor") for word in _VALUES]:
        if (function := _found(name)) is not None:
            table[function] = _value(function, _spoken(name))
    for word in _FACTORIES:
        table[getattr(torch, word)] = _value(getattr(torch, word), f"torch.{word}()")
    for kind in ("cpu", "cuda", "xpu", "mps", "meta", "mtia", "ipu", "maia", "vulkan", "xla"):
        attribute = getattr(_T, f"is_{kind}", None)
        if attribute is not None:
            table[attribute.__get__] = _on(kind)
    table[_T.device.__get__] = lambda pointer: pointer._handle.link.device
    table[_T.requires_grad.__get__] = lambda pointer: pointer._requires_grad()
    table[_T.is_leaf.__get__] = lambda pointer: pointer._is_leaf()
    table[_T.grad_fn.__get__] = lambda pointer: pointer._grad_fn()
    table[_T.grad.__get__] = lambda pointer: pointer._get_grad()
    table[_T.grad.__set__] = lambda pointer, value: pointer._set_grad(value)
    table[_T.grad.__delete__] = lambda pointer: pointer._set_grad(None)
    table[_T.backward] = lambda pointer, *args, **kwargs: pointer._backward(*args, **kwargs)
    table[_T.retain_grad] = lambda pointer: pointer._retain_grad()
    table[_T.__deepcopy__] = lambda pointer, memo: pointer._deepcopy(memo)
    table[_T.__reversed__] = lambda pointer: pointer.flip(0) if pointer.ndim else pointer
    table[_T.__reduce_ex__] = _no_pickle
    table[_T.cpu] = _cpu
    table[torch.eye] = _eye
    table[torch.empty_like] = _empty_like
    table[_T.new_empty] = _new_empty
    for name in dir(torch):
        if name.startswith("_foreach_") and name.endswith("_"):
            table[getattr(torch, name)] = _each(name.removeprefix("_foreach_"))
    table[_T.view_as] = _view_as
    table[_PACK] = _pack
    # nn.TransformerEncoder asks this before its short cut of nested tensors.
    table[torch._nested_tensor_from_mask_left_aligned] = lambda *_: False
    table[torch.tensor_split] = table[_T.tensor_split] = _tensor_split
    table[F.triplet_margin_with_distance_loss] = _triplet_margin_with_distance_loss
    table[torch._has_compatible_shallow_copy_type] = _together
    table[nn.init.uniform_] = _uniform
    table[nn.init.normal_] = _normal
    table[nn.init.constant_] = _constant
    table[nn.init.kaiming_uniform_] = _kaiming_uniform
    return table


#: Functions whose result is a value of Python's.
_VALUES: Final = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "equal",
        "allclose",
        "is_nonzero",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "__long__",
        "__complex__",
        "__nonzero__",
        "__contains__",
        "__array__",
    ]
)
#: What makes a tensor of numbers: a pointer among them is a number that is needed here.
_FACTORIES: Final = (
    *("arange", "bartlett_window", "blackman_window", "hamming_window", "hann_window"),
    *("kaiser_window", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm"),
    *("range", "tril_indices", "triu_indices", "zeros"),
)
#: Answered without a command, by torch's function.
LOCAL: Final = _build()
