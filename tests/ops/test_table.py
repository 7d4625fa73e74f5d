"""The table: what is in it, what is not, and that a peer's text never reaches further."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import get_overridable_functions, resolve_name

from wsfed.errors import OpNotAllowed
from wsfed.ops import refused
from wsfed.ops.table import OPS, REFUSED, depends_on_floats, lookup, wire_name

ROOT = Path(__file__).resolve().parents[2]


def arriving_names(call: Any) -> set[str | None]:
    """Wire names of the operations that a Tensor subclass sees during a call."""
    seen: list[Any] = []

    class Spy(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    call(lambda *shape: torch.rand(*shape).as_subclass(Spy))
    return {wire_name(function) for function in seen}


# --- what is in it -------------------------------------------------------------------------------


def test_a_name_gives_torchs_own_function() -> None:
    assert lookup("torch.matmul").call is torch.matmul
    assert lookup("torch.nn.functional.cross_entropy").call is functional.cross_entropy
    assert lookup("torch.Tensor.add_").call is torch.Tensor.add_


def test_a_function_and_its_name_belong_together() -> None:
    for name, op in OPS.items():
        found = wire_name(op.call)
        assert found is None or OPS[found].call is op.call, name


def test_a_guarded_function_is_found_by_torchs_own() -> None:
    assert wire_name(torch.Tensor.to) == "torch.Tensor.to"
    assert wire_name(torch.lstm) == "torch.lstm"
    assert wire_name(functional.ctc_loss) == "torch.nn.functional.ctc_loss"


def test_an_alias_of_a_refused_name_is_still_found() -> None:
    assert torch.mm == torch.spmm  # torch.overrides calls both by the second name
    assert wire_name(torch.mm) == "torch.mm"


def test_properties_travel() -> None:
    assert wire_name(torch.Tensor.grad.__get__) == "torch.Tensor.grad.__get__"  # type: ignore[attr-defined]
    assert wire_name(torch.Tensor.T.__get__) == "torch.Tensor.T.__get__"  # type: ignore[attr-defined]
    tensor = torch.zeros(2, requires_grad=True)
    lookup("torch.Tensor.grad.__set__").call(tensor, torch.ones(2))
    assert lookup("torch.Tensor.grad.__get__").call(tensor) is tensor.grad


@pytest.mark.parametrize("layer", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_arrives_as_one_operation(layer: str) -> None:
    name = {"LSTM": "torch.lstm", "GRU": "torch.gru", "RNN": "torch.rnn_tanh"}[layer]
    assert name in arriving_names(lambda made: getattr(nn, layer)(3, 4)(made(2, 1, 3)))


def test_gradients_and_lists_of_tensors_are_in_it() -> None:
    def call(made: Any) -> None:
        x = made(3).requires_grad_()
        torch.autograd.grad((x * x).sum(), [x])
        torch._foreach_norm([made(2), made(3)])
        nn.utils.rnn.pad_sequence([made(2), made(3)])

    assert {"torch.autograd.grad", "torch._foreach_norm", "torch._C._nn.pad_sequence"} <= (
        arriving_names(call)
    )


def test_everything_that_torch_lets_us_intercept_is_accounted_for() -> None:
    functions = {each for group in get_overridable_functions().values() for each in group}
    for function in functions:
        name = resolve_name(function)
        known = wire_name(function) or refused.reason(name) or name in refused.LOCAL
        assert known, f"{name} is neither run, nor refused, nor answered by the client"


def test_shapes_that_depend_on_fractions_are_known() -> None:
    assert depends_on_floats("torch.nn.functional.interpolate")
    assert not depends_on_floats("torch.add")


def test_importing_it_takes_little_time() -> None:
    program = (
        "import time, torch, wsfed.errors, wsfed.protocol.values, wsfed.protocol.limits\n"
        "start = time.process_time()\n"
        "import wsfed.ops.table, wsfed.ops.arguments\n"
        "print(time.process_time() - start)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) < 0.5  # about 0.01 s; the bound only tells a list from a search


# --- what is not ---------------------------------------------------------------------------------


def test_nothing_refused_is_in_the_table() -> None:
    assert not REFUSED.keys() & OPS.keys()
    assert not refused.LOCAL & OPS.keys()


def test_the_tables_cannot_be_changed() -> None:
    for table in (OPS, REFUSED):
        with pytest.raises(TypeError):
            table["torch.load"] = table[next(iter(table))]  # type: ignore[index]


@pytest.mark.parametrize(
    "name",
    [
        "load",
        "save",
        "from_file",
        "jit.load",
        "hub.load",
        "compile",
        "set_num_threads",
        "manual_seed",
        "empty",
        "empty_like",
        "Tensor.new_empty",
        "Tensor.resize_",
        "Tensor.set_",
        "as_strided",
        "Tensor.data_ptr",
        "Tensor.untyped_storage",
        "Tensor.apply_",
        "Tensor.map_",
        "Tensor.register_hook",
        "Tensor.item",
        "Tensor.numpy",
        "Tensor.__reduce_ex__",
        "Tensor.share_memory_",
        "Tensor.__dlpack__",
        "Tensor.cuda",
        "native_batch_norm",
        "_fused_adam_",
        "quantize_per_tensor",
        "Tensor.to_sparse",
        "_foreach_copy_",
    ],
)
def test_what_is_refused_says_why(name: str) -> None:
    with pytest.raises(OpNotAllowed) as caught:
        lookup(f"torch.{name}")
    assert caught.value.op == f"torch.{name}"
    assert caught.value.message == refused.reason(f"torch.{name}")
    assert "knows no operation" not in caught.value.message


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "torch",
        "torch.",
        "torch.Tensor",
        "torch.os.system",
        "os.system",
        "builtins.eval",
        "__class__",
        "torch.__class__",
        "torch.Tensor.__class__",
        "torch.Tensor.__init__.__globals__",
        "torch.Tensor.add.__self__",
        "torch.Tensor.__torch_function__",
        "torch.nn.functional.torch.load",
        "torch.add\0",
        "torch.add ",
        "TORCH.ADD",
        "torch.ａdd",
        "\x1b[2Jtorch.add\n",
        "\ud800",
    ],
)
def test_an_unknown_name_is_refused_in_printable_text(name: str) -> None:
    with pytest.raises(OpNotAllowed) as caught:
        lookup(name)
    assert str(caught.value).isascii()
    assert caught.value.op.isprintable()


def test_a_name_of_a_megabyte_is_not_repeated() -> None:
    with pytest.raises(OpNotAllowed) as caught:
        lookup("torch." + "a" * 2**20)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", [None, 7, 1.5, b"torch.add", ["torch.add"], {}, ("a",) * 9999])
def test_a_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(OpNotAllowed, match="named by text") as caught:
        lookup(name)
    assert len(str(caught.value)) < 200


# --- keywords ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"out": torch.zeros(1)},
        {"generator": torch.default_generator},
        {"pin_memory": True},
        {"device": "cuda"},
        {"device": "cpu"},
    ],
)
def test_some_keywords_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(OpNotAllowed, match=next(iter(kwargs))):
        lookup("torch.zeros_like").check(kwargs)


def test_other_keywords_are_welcome() -> None:
    op = lookup("torch.zeros_like")
    op.check({})
    op.check({"dtype": torch.float32, "device": torch.device("cpu")})
    op.check({"out": None, "generator": None, "pin_memory": False})


def test_what_an_operation_changes_is_no_keyword() -> None:
    with pytest.raises(OpNotAllowed, match="first argument"):
        lookup("torch.Tensor.__ipow__").check({"self": torch.ones(1)})


def test_an_operation_knows_whether_it_changes_its_first_argument() -> None:
    names = ("add_", "__iadd__", "__setitem__", "grad.__set__", "zero_")
    assert all(lookup(f"torch.Tensor.{name}").inplace for name in names)
    assert not any(lookup(f"torch.Tensor.{name}").inplace for name in ("add", "__invert__"))
