"""The codec of arguments: there and back, and whatever a hostile peer may send instead."""

from __future__ import annotations

import collections
import enum
import io
import math
import pathlib
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsfed.errors import OpNotAllowed, RemoteProtocolError
from wsfed.ops.arguments import MAX_ITEMS, decode, encode
from wsfed.protocol import limits
from wsfed.protocol import values as v

CPU = torch.device("cpu")
TENSORS = [torch.tensor(0), torch.tensor([1.0]), torch.zeros(2, 3)]


def ref(tensor: torch.Tensor) -> int:
    return next(place for place, one in enumerate(TENSORS) if one is tensor)


def resolve(id: int) -> torch.Tensor:
    if not 0 <= id < len(TENSORS):
        raise KeyError(id)
    return TENSORS[id]


def over_the_wire(value: Any) -> Any:
    """What the worker gets of a value."""
    return decode(msgpack.unpackb(msgpack.packb(encode(value, ref))), resolve, CPU)


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in type and value, and tensors the same object."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    if isinstance(a, slice):
        return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex):
        return same((a.real, a.imag), (b.real, b.imag))
    return bool(a == b)


integers = st.integers(-(2**63), 2**64 - 1)
bounds = st.none() | integers | st.sampled_from(TENSORS)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=20),
    st.sampled_from(TENSORS),
    st.just(...),
    st.builds(slice, bounds, bounds, bounds),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5).map(torch.Size),
    st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.complex64]),
    st.sampled_from([torch.channels_last, torch.contiguous_format, torch.preserve_format]),
    st.sampled_from([torch.strided, CPU]),
)
arguments = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=5), inner, max_size=4),
    ),
    max_leaves=12,
)


# --- there and back ------------------------------------------------------------------------------


@given(arguments)
def test_an_argument_arrives_as_it_was(value: Any) -> None:
    assert same(over_the_wire(value), value)


def test_every_dtype_arrives_but_those_of_quantised_tensors() -> None:
    for dtype in {each for each in vars(torch).values() if isinstance(each, torch.dtype)}:
        if str(dtype).removeprefix("torch.").startswith(("q", "bits")):
            with pytest.raises(TypeError, match="does not travel"):
                encode(dtype, ref)
        else:
            assert over_the_wire(dtype) is dtype


class Colour(enum.IntEnum):
    RED = 3


class Pair(collections.namedtuple("Pair", "left right")):
    __slots__ = ()


@pytest.mark.parametrize(
    ("given_", "arrives"),
    [
        (float, torch.float64),
        (int, torch.int64),
        (bool, torch.bool),
        (complex, torch.complex128),
        (Colour.RED, 3),
        (Pair(1, 2), (1, 2)),
        (collections.OrderedDict(a=1), {"a": 1}),
        (range(3), [0, 1, 2]),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(5), 5),
        (np.bool_(True), True),
        (np.complex128(1j), 1j),
        (np.str_("mean"), "mean"),
        (np.array(3), 3),
    ],
)
def test_what_is_meant_as_a_plain_value_arrives_as_one(given_: Any, arrives: Any) -> None:
    assert same(over_the_wire(given_), arrives)


# --- what does not travel ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (lambda: 1, "runs no code"),
        (print, "runs no code"),
        (Colour, "runs no code"),
        (torch.nn.Linear(1, 1), "worker.send"),
        (torch.Generator(), "manual_seed"),
        (np.zeros(2), "from_numpy"),
        (io.StringIO(), "opens no files"),
        (pathlib.Path("/etc/passwd"), "opens no files"),
        (object(), "object does not travel"),
        (b"bytes", "bytes does not travel"),
        ({1, 2}, "set does not travel"),
        (2**64, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        ({1: 2}, "keys have to be text"),
        ("a" * (limits.MAX_TEXT + 1), "too long"),
        ("\ud800", "no Unicode"),
        ([0] * (MAX_ITEMS + 1), "too many"),
        (dict.fromkeys(map(str, range(MAX_ITEMS))), "too large"),
        (torch.quint8, "quantised"),
        (torch.sparse_coo, "sparse"),
        (torch.device("meta"), "meta"),
        (torch, "module does not travel"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_travel_is_named(value: Any, advice: str) -> None:
    for wrapped in (value, [value], {"key": (value,)}):
        with pytest.raises(TypeError, match=advice):
            encode(wrapped, ref)


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TypeError, match="deeper"):
        encode(endless, ref)


def test_what_can_be_sent_nested_can_be_read_nested() -> None:
    value: Any = 1
    for _ in range(limits.MAX_DEPTH):
        value = [value]
    assert over_the_wire(value) == value
    with pytest.raises(TypeError, match="deeper"):
        encode([value], ref)


# --- from a hostile peer -------------------------------------------------------------------------

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=20,
)
tagged = st.recursive(
    junk,
    lambda inner: st.builds(
        lambda tag, items: [tag, *items], st.integers(-1, 12), st.lists(inner, max_size=5)
    ),
    max_leaves=20,
)


@given(tagged)
def test_anything_is_an_argument_or_malformed(wire: Any) -> None:
    said = "nothing"
    try:
        decode(wire, lambda id: TENSORS[0], CPU)
    except (RemoteProtocolError, OpNotAllowed) as error:
        said = str(error)
    assert len(said) < 200
    assert said.isascii()


@pytest.mark.parametrize(
    "wire",
    [
        b"bytes",
        {"a": 1},
        (v.LIST, 1),
        [],
        [None],
        ["0", 1],
        [True, 1],
        [0.0, 1],
        [99],
        [-1],
        [2**200],
        2**64,
        "a" * (limits.MAX_TEXT + 1),
        [v.REF],
        [v.REF, 1, 2],
        [v.REF, "1"],
        [v.REF, True],
        [v.REF, 1.0],
        [v.REF, [v.REF, 1]],
        [v.LIST, []],
        [v.LIST, *[0] * (MAX_ITEMS + 1)],
        [v.DICT, "a"],
        [v.DICT, 1, 2],
        [v.DICT, "a", 1, "a", 2],
        [v.SLICE],
        [v.SLICE, 1, 2],
        [v.SLICE, 1, 2, "3"],
        [v.SLICE, [v.LIST], None, None],
        [v.ELLIPSIS, 1],
        [v.DTYPE],
        [v.DTYPE, "os"],
        [v.DTYPE, "float"],
        [v.DTYPE, "__class__"],
        [v.DTYPE, "quint8"],
        [v.DTYPE, ["float32"]],
        [v.DTYPE, "float32", "float32"],
        [v.DTYPE, "\x1b[2J" * 1000],
        [v.DEVICE],
        [v.DEVICE, 0],
        [v.DEVICE, "c" * 41],
        [v.LAYOUT, "sparse_coo"],
        [v.MEMORY_FORMAT, "strided"],
        [v.COMPLEX, 1.0],
        [v.COMPLEX, "1", "2"],
        [v.COMPLEX, True, 1.0],
        [v.SIZE, 1.0],
        [v.SIZE, True],
        [v.SIZE, 2**64],
        [v.SIZE, None],
    ],
    ids=lambda wire: repr(wire)[:30],
)
def test_what_is_not_well_formed_is_malformed(wire: Any) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(wire, resolve, CPU)
    assert caught.value.code == "malformed"
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_nesting_is_bounded() -> None:
    wire: Any = 1
    for _ in range(10_000):
        wire = [v.LIST, wire]
    with pytest.raises(RemoteProtocolError, match="too deep"):
        decode(wire, resolve, CPU)


def test_an_identifier_that_is_unknown_is_for_the_store_to_tell() -> None:
    with pytest.raises(KeyError):
        decode([v.LIST, [v.REF, 77]], resolve, CPU)


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "meta", "mps", "cpu:0:0", "", "\x1b[2J"])
def test_a_device_that_is_not_the_workers_is_refused(name: str) -> None:
    with pytest.raises(OpNotAllowed, match="computes on cpu") as caught:
        decode([v.DEVICE, name], resolve, CPU)
    assert caught.value.message.isprintable()


def test_the_workers_own_device_has_its_number() -> None:
    second = torch.device("cuda:1")
    assert decode([v.DEVICE, "cuda"], resolve, second) == second
    assert decode([v.DEVICE, "cuda:1"], resolve, second) == second
    assert decode([v.DEVICE, "cpu"], resolve, second) == CPU
    with pytest.raises(OpNotAllowed):
        decode([v.DEVICE, "cuda:0"], resolve, second)


def test_a_peer_that_packs_whole_numbers_as_integers_is_understood() -> None:
    assert decode([v.COMPLEX, 1, 2.5], resolve, CPU) == 1 + 2.5j
