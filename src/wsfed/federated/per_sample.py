"""Gradients of each row of a batch by itself, of ordinary modules, from one backward pass.

What a layer is given and the gradient of what it gives make the gradient of its parameters, row by
row (Goodfellow 2015, *Efficient per-example gradient computations*; Rochette et al. 2019,
*Efficient per-example gradient computations in convolutional neural networks*). opacus has the rule
of each kind of layer; its hooks are not needed, so that all of it can be recorded for a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from wsfed.errors import FederatedError

__all__ = ["check_per_sample", "per_sample_gradients"]

#: ``(layer, what it was given, gradient of what it gave) -> gradients by parameter``, of each row.
_Rule: TypeAlias = Callable[
    [Any, list[torch.Tensor], torch.Tensor], Mapping[torch.Tensor, torch.Tensor]
]


def check_per_sample(model: nn.Module) -> None:
    """Whether each parameter to train has gradients by row.

    Raises:
        FederatedError: layers mix rows (batch norm), or there is no rule for their parameters.
        ImportError: opacus is not installed.
    """
    from opacus.validators import ModuleValidator

    errors = [str(error) for error in ModuleValidator.validate(model, strict=False)]
    ruled = {id(each) for layer in _layers(model) for each in _own(layer)}
    errors += [
        f"{name or 'the model itself'} ({type(layer).__name__}) has parameters and no rule for "
        "their gradients by row"
        for name, layer in model.named_modules()
        if any(each.requires_grad and id(each) not in ruled for each in _own(layer))
    ]
    if errors:
        raise FederatedError("the model cannot be trained by DP-SGD: " + "; ".join(errors))


def per_sample_gradients(
    model: nn.Module, objective: Callable[..., torch.Tensor], batch: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, dict[torch.Tensor, torch.Tensor]]:
    """The loss of a batch, and the gradient of each row's own loss.

    Args:
        model: of layers that :func:`check_per_sample` takes.
        objective: ``(model, *batch) -> loss``, the mean over the rows of what depends on one each.
        batch: fields, the rows first.

    Returns:
        The loss, detached, and by parameter a tensor of shape ``[rows, *parameter.shape]``.
    """
    rules, rows = _rules(), len(batch[0])
    calls: list[tuple[nn.Module, list[torch.Tensor], torch.Tensor]] = []
    with _noting(model, calls):
        loss = objective(model, *batch)
    slopes = torch.autograd.grad(loss * rows, [given for _, _, given in calls])
    found: dict[torch.Tensor, torch.Tensor] = {}
    for (layer, taken, _), slope in zip(calls, slopes, strict=True):
        for parameter, gradient in rules[type(layer)](layer, taken, slope).items():
            if parameter.requires_grad:
                known = found.get(parameter)
                found[parameter] = gradient if known is None else known + gradient
    return loss.detach(), found


def _own(layer: nn.Module) -> Iterator[nn.Parameter]:
    return layer.parameters(recurse=False)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Those that have parameters to train, and a rule for their gradients by row."""
    rules = _rules()
    return [
        layer
        for layer in model.modules()
        if type(layer) in rules
        and getattr(layer, "padding_mode", "zeros") == "zeros"
        and any(each.requires_grad for each in _own(layer))
    ]


@contextmanager
def _noting(
    model: nn.Module, calls: list[tuple[nn.Module, list[torch.Tensor], torch.Tensor]]
) -> Iterator[None]:
    """While this lasts, calls of layers with parameters to train are noted, in their order."""
    layers = _layers(model)

    def noted(layer: nn.Module, forward: Callable[..., Any], *taken: Any, **named: Any) -> Any:
        given = forward(*taken, **named)
        calls.append((layer, [each.detach() for each in (*taken, *named.values())], given))
        return given

    for layer in layers:
        layer.forward = partial(noted, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _rules() -> Mapping[type, _Rule]:
    from opacus.grad_sample import GradSampleModule

    # opacus' own rules for these look at memory through strides, or make tensors where it runs.
    rules = {k: rule for k, rule in GradSampleModule.GRAD_SAMPLERS.items() if k is not nn.Conv3d}
    own = {nn.Conv1d: _convolution, nn.Conv2d: _convolution, nn.Embedding: _embedding}
    return {**rules, **own}


def _embedding(
    layer: Any, taken: list[torch.Tensor], slope: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Of an embedding: what each place of a row adds to the vector of its word."""
    rows, width = len(slope), layer.embedding_dim
    words, slopes = taken[0].reshape(rows, -1, 1), slope.reshape(rows, -1, width)
    if layer.padding_idx is not None:
        slopes = slopes * (words != layer.padding_idx)
    zeros = slope.new_zeros(rows, layer.num_embeddings, width)
    return {layer.weight: zeros.scatter_add(1, words.expand(slopes.shape), slopes)}


def _convolution(
    layer: Any, taken: list[torch.Tensor], slope: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Of a convolution in one dimension or two (Rochette et al. 2019, section 3).

    With patches ``p`` of what was given (``F.unfold``) the weight's gradient of row ``n`` is
    ``sum over places l of slope[n, out, l] * p[n, in, l]``, in each group by itself.
    """
    given, kernel, groups = taken[0], layer.kernel_size, layer.groups
    stride, dilation, padding = layer.stride, layer.dilation, layer.padding
    if given.ndim == 3:  # one dimension is two, of which one has a size of 1
        given, slope = given.unsqueeze(2), slope.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        padding = padding if isinstance(padding, str) else (0, *padding)
    if padding == "valid":
        padding = (0,) * len(kernel)
    elif padding == "same":
        totals = [by * (size - 1) for by, size in zip(dilation, kernel, strict=True)]
        before = [total // 2 for total in totals]
        sides = zip(before, totals, strict=True)
        given = F.pad(given, [end for b, t in reversed(list(sides)) for end in (b, t - b)])
        padding = (0,) * len(kernel)
    patches = F.unfold(given, kernel, dilation=dilation, padding=padding, stride=stride)
    rows = len(given)
    by_group = slope.reshape(rows, groups, layer.out_channels // groups, -1)
    weight = torch.einsum(
        "ngol,ngil->ngoi", by_group, patches.reshape(rows, groups, -1, patches.shape[-1])
    )
    made = {layer.weight: weight.reshape(rows, *layer.weight.shape)}
    if layer.bias is not None:
        made[layer.bias] = slope.flatten(2).sum(2)
    return made
