"""The checked-in names against torch's own catalogue of operators, ``op_db``.

Each entry runs once, on its first sample: what the table says of an operation has to be seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from wsfed.ops.table import OPS, Op, wire_name

ROOT = Path(__file__).resolve().parents[2]
#: Its first sample is an error by intention.
NOT_RUN = {"torch.Tensor.float_power_": "its sample has the wrong dtype for writing in place"}


@pytest.fixture(scope="module")
def calls() -> list[tuple[Op, Any, Any]]:
    """Operation, its entry, and its arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(_calls())


def _calls() -> Iterator[tuple[Op, Any, Any]]:
    from torch.testing._internal.common_methods_invocations import op_db

    for entry in op_db:
        if not entry.dtypes:
            continue
        dtype = torch.float32 if torch.float32 in entry.dtypes else min(entry.dtypes, key=str)
        sample = next(iter(entry.sample_inputs("cpu", dtype)))
        for function in dict.fromkeys((entry.op, entry.method_variant, entry.inplace_variant)):
            name = wire_name(function) if function is not None else None
            if name is not None and name not in NOT_RUN:
                yield OPS[name], entry, _detached((sample.input, sample.args, sample.kwargs))


def _detached(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), value)


def _run(op: Op, arguments: Any) -> Any:
    first, args, kwargs = arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return op.call(first, *args, **kwargs)


def _memory(value: Any) -> set[int]:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    dense = [each for each in tensors if each.layout is torch.strided and each.numel()]
    return {each.untyped_storage().data_ptr() for each in dense}


def test_enough_of_the_catalogue_is_covered(calls: list[tuple[Op, Any, Any]]) -> None:
    assert len({op.name for op, _, _ in calls}) > 700


def test_what_is_not_marked_random_draws_nothing(calls: list[tuple[Op, Any, Any]]) -> None:
    drew = set()
    for op, _, arguments in calls:
        before = torch.default_generator.get_state()
        _run(op, _detached(arguments))
        if not op.random and not torch.equal(before, torch.default_generator.get_state()):
            drew.add(op.name)
    assert not drew


def test_what_shares_memory_with_an_argument_carries_rows(calls: list[tuple[Op, Any, Any]]) -> None:
    for op, _, arguments in calls:
        if not op.carries_rows and not op.inplace:
            given = _detached(arguments)
            assert not _memory(given) & _memory(_run(op, given)), op.name


def test_element_wise_operations_carry_rows(calls: list[tuple[Op, Any, Any]]) -> None:
    from torch.testing._internal.opinfo.core import BinaryUfuncInfo, ShapeFuncInfo, UnaryUfuncInfo

    kinds = (UnaryUfuncInfo, BinaryUfuncInfo, ShapeFuncInfo)
    assert not {op.name for op, entry, _ in calls if isinstance(entry, kinds)} - {
        name for name, op in OPS.items() if op.carries_rows
    }


def test_copies_of_views_carry_rows() -> None:
    copies = [op for name, op in OPS.items() if name.endswith("_copy")]
    assert len(copies) > 15
    assert all(op.carries_rows for op in copies)


@pytest.mark.parametrize(
    "name",
    [
        "Tensor.__getitem__",
        "Tensor.__setitem__",
        "Tensor.clone",
        "Tensor.detach",
        "Tensor.contiguous",
        "Tensor.to",
        "Tensor.float",
        "Tensor.grad.__get__",
        "Tensor.data.__get__",
        "Tensor.T.__get__",
        "Tensor.new_tensor",
        "cat",
        "stack",
        "gather",
        "index_select",
        "take",
        "masked_select",
        "where",
        "sort",
        "topk",
        "functional.unique",
        "flip",
        "roll",
        "Tensor.repeat",
        "nn.functional.pad",
        "nn.functional.one_hot",
        "nn.functional.dropout",
        "functional.einsum",
        "full_like",
        "bucketize",
        "autograd.grad",
        "_foreach_clone",
        "_foreach_add",
        "_C._nn.pad_sequence",
        "_pack_padded_sequence",
        "view_copy",
        "triangular_solve",
    ],
)
def test_what_moves_rows_about_carries_them(name: str) -> None:
    assert OPS[f"torch.{name}"].carries_rows


@pytest.mark.parametrize(
    "name",
    [
        "matmul",
        "sum",
        "mean",
        "nn.functional.linear",
        "nn.functional.conv2d",
        "nn.functional.cross_entropy",
        "lstm",
        "nn.functional.mse_loss",
        "zeros_like",
        "Tensor.new_zeros",
    ],
)
def test_what_is_computed_over_rows_does_not(name: str) -> None:
    assert not OPS[f"torch.{name}"].carries_rows


@pytest.mark.parametrize(
    "name",
    [
        "rand_like",
        "randn_like",
        "randint_like",
        "bernoulli",
        "Tensor.bernoulli_",
        "multinomial",
        "normal",
        "poisson",
        "Tensor.uniform_",
        "Tensor.exponential_",
        "Tensor.random_",
        "rrelu",
        "nn.functional.gumbel_softmax",
        "nn.functional.dropout",
        "nn.functional.dropout2d",
        "nn.functional.alpha_dropout",
        "lstm",
        "gru",
        "rnn_tanh",
        "nn.functional.multi_head_attention_forward",
        "nn.functional.scaled_dot_product_attention",
        "nn.functional.fractional_max_pool2d",
    ],
)
def test_what_draws_is_marked_random(name: str) -> None:
    assert OPS[f"torch.{name}"].random


def test_the_checked_in_names_are_what_the_generator_makes() -> None:
    script = ROOT / "scripts" / "generate_ops.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    out = subprocess.run(
        [sys.executable, str(script), "--check"], env=environment, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout + out.stderr
