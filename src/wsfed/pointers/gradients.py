"""``backward`` and ``torch.autograd.grad`` on pointers: the worker's graph does the work.

What is known here of that graph (:mod:`wsfed.pointers.autograd`) tells which gradients there are,
so that nothing waits, and torch's own errors are raised at the user's line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from wsfed.errors import NotCollocated, OpNotAllowed, PointerError
from wsfed.pointers.autograd import Node, mark
from wsfed.pointers.calls import check_function, is_pointer, make, mode_now
from wsfed.pointers.link import Link
from wsfed.pointers.recording import recording_now
from wsfed.pointers.shapes import intern_meta
from wsfed.pointers.site import Site, capture_site, describe_site
from wsfed.protocol import messages as m
from wsfed.protocol import modes
from wsfed.protocol.values import LIST, REF

__all__ = ["backward", "grad"]

_GRAD: Final = "torch.autograd.grad"


def backward(
    tensors: torch.Tensor | Sequence[torch.Tensor],
    grad_tensors: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> None:
    """``torch.autograd.backward``, on the worker."""
    roots, site = list(map(_pointer_of, _several(tensors))), capture_site()
    only = None if inputs is None else list(map(_pointer_of, _several(inputs)))
    gradients = _gradients(roots, grad_tensors)
    link = _one_link("backward", [*roots, *gradients, *(only or ())], site)
    command = m.Backward(
        [each._handle.id for each in roots],
        None
        if grad_tensors is None
        else [None if each is None else each._handle.id for each in gradients],
        retain_graph,
        create_graph,
        None if only is None else [each._handle.id for each in only],
        _mode(),
    )
    if (recording := recording_now()) is not None:
        recording.saw([*roots, *gradients, *(only or ())])
    link.issue(command.wire(), site)
    nodes = None if only is None else {each._graph_node() for each in only}
    begun = [each._graph_node() for each in roots]
    marked = mark(begun, only=nodes, create_graph=create_graph)
    if recording is not None:
        recording.marked(begun, nodes, marked, create_graph=create_graph)


def grad(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    inputs: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    grad_outputs: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """``torch.autograd.grad``, on the worker.

    With ``create_graph`` the results are part of the graph of everything the outputs depend on.
    """
    if is_grads_batched:
        raise OpNotAllowed("is_grads_batched is not carried to workers; write a loop", op=_GRAD)
    if isinstance(inputs, Mapping):
        words = (grad_outputs, retain_graph, create_graph, only_inputs, allow_unused)
        given = grad(outputs, tuple(inputs.values()), *words, False, materialize_grads)
        return dict(zip(inputs, given, strict=True))
    roots, site = list(map(_pointer_of, _several(outputs))), capture_site()
    wanted = list(map(_pointer_of, _several(inputs)))
    gradients = _gradients(roots, grad_outputs)
    link = _one_link(_GRAD, [*roots, *wanted, *gradients], site)
    for each in wanted:
        if not each._known().requires_grad:
            raise RuntimeError("One of the differentiated Tensors does not require grad")
    nodes = [each._graph_node() for each in wanted]
    used = _reached([each._graph_node() for each in roots], set(nodes))
    if not (allow_unused or materialize_grads) and not used.issuperset(nodes):
        place = next(place for place, node in enumerate(nodes) if node not in used)
        raise RuntimeError(
            f"The differentiated Tensor at index {place} appears to not have been used in the "
            "graph. Set allow_unused=True if this is the desired behavior."
        )
    parents: tuple[Node, ...] = ()
    if create_graph:
        all_roots = [*roots, *(g for g in gradients if g is not None and g._known().requires_grad)]
        parents = tuple(each._graph_node() for each in all_roots)
    asked = [each for each, node in zip(wanted, nodes, strict=True) if node in used]
    if (recording := recording_now()) is not None:
        recording.saw([*roots, *wanted, *gradients])
    made = {each._graph_node(): _result(link, each, parents) for each in asked}
    if made:
        _issue_grad(link, roots, asked, gradients, made, retain_graph, create_graph, site)
    return tuple(
        made[node] if node in made else torch.zeros_like(each) if materialize_grads else None
        for each, node in zip(wanted, nodes, strict=True)
    )


def _issue_grad(
    link: Link,
    roots: list[Any],
    asked: list[Any],
    gradients: list[Any],
    made: Mapping[Node, Any],
    retain_graph: bool | None,
    create_graph: bool,
    site: Site | None,
) -> None:
    given: list[Any] = [LIST, *(None if g is None else [REF, g._handle.id] for g in gradients)]
    kwargs = {
        "grad_outputs": given if any(each is not None for each in gradients) else None,
        "retain_graph": retain_graph,
        "create_graph": create_graph,
        "allow_unused": True,
    }
    distinct = {each._graph_node(): each for each in asked}
    args = [
        [LIST, *([REF, each._handle.id] for each in roots)],
        [LIST, *([REF, each._handle.id] for each in distinct.values())],
    ]
    outs = [made[node]._handle.id for node in distinct]
    link.issue([m.Execute.code, _GRAD, outs, args, kwargs, _mode()], site)


def _result(link: Link, like: Any, parents: tuple[Node, ...]) -> Any:
    meta = like._known()
    is_leaf = not parents
    result = make(
        link,
        link.new_id(),
        intern_meta(meta.shape, meta.stride, meta.dtype, not is_leaf, is_leaf),
    )
    if parents:
        result.__dict__["_node"] = Node(parents, is_guess=True)
    return result


def _reached(roots: list[Node], wanted: set[Node]) -> set[Node]:
    """Those of ``wanted`` that the roots depend on."""
    found, seen, pending = set[Node](), set[Node](), list(roots)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in wanted:
            found.add(node)
        pending.extend(node.parents)
    return found


# --- what both begin with -------------------------------------------------------------------------


def _mode() -> int:
    watched = torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()
    return mode_now() | (modes.ANOMALY if watched else 0)


def _gradients(roots: list[Any], given: Any) -> list[Any]:
    """The gradient of each root: a pointer, or ``None`` for one. Local ones are sent."""
    gradients = _several(given) or [None] * len(roots)
    if len(gradients) != len(roots):
        raise RuntimeError(f"got {len(roots)} tensors and {len(gradients)} gradients")
    link = roots[0]._handle.link
    there = [each if each is None or is_pointer(each) else _sent(link, each) for each in gradients]
    for place, (root, gradient) in enumerate(zip(roots, there, strict=True)):
        check_function(root)
        _check_root(place, root, gradient)
    return there


def _sent(link: Link, tensor: torch.Tensor) -> Any:
    id = link.new_id()
    link.store(id, tensor, tensor.requires_grad, capture_site())
    stride = torch.empty(tensor.shape, device="meta").stride()
    shape = tuple(tensor.shape)
    return make(link, id, intern_meta(shape, stride, tensor.dtype, tensor.requires_grad, True))


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _check_root(place: int, root: Any, gradient: Any) -> None:
    meta = root._known()
    if not meta.requires_grad:
        raise RuntimeError(
            f"element {place} of tensors does not require grad and does not have a grad_fn"
        )
    if gradient is None and torch.Size(meta.shape).numel() != 1:
        raise RuntimeError("grad can be implicitly created only for scalar outputs")
    if gradient is not None and gradient._known().shape != meta.shape:
        raise RuntimeError(
            f"Mismatch in shape: grad_output[{place}] has a shape of "
            f"{torch.Size(gradient._known().shape)} and output[{place}] has a shape of "
            f"{torch.Size(meta.shape)}."
        )


def _one_link(what: str, pointers: list[Any], site: Site | None) -> Link:
    link: Link = pointers[0]._handle.link
    for each in pointers:
        if each is not None and each._handle.link is not link:
            names = (link.worker.id, each._handle.link.worker.id)
            raise NotCollocated(what, names, describe_site(site))
    return link


def _pointer_of(tensor: torch.Tensor) -> Any:
    if not is_pointer(tensor):
        raise PointerError("a local tensor is no part of a graph on a worker; send it first")
    return tensor
