"""Transforms: each against plain torch, what they refuse, and how they are written."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from wsfed.errors import DatasetError
from wsfed.tensors import DTYPES
from wsfed.worker import columns
from wsfed.worker.columns import Texts, Unfit
from wsfed.worker.transforms import (
    TRANSFORMS,
    Cast,
    Drop,
    FillNan,
    Flatten,
    Normalise,
    OneHot,
    Rename,
    Reshape,
    Resize,
    Scale,
    Select,
    Tokenise,
    Transform,
    parse_transform,
    transformed,
)

TABLE = torch.tensor([[1.0, 10], [3, 10], [8, 10]])
PIXELS = torch.arange(48, dtype=torch.uint8).reshape(2, 3, 2, 4)


def done(transform: Transform, values: Any) -> torch.Tensor:
    (result,) = transformed({"x": values}, [("x", transform)]).values()
    assert isinstance(result, torch.Tensor)
    return result


def refusal(transform: Transform, values: Any) -> str:
    with pytest.raises(Unfit) as caught:
        done(transform, values)
    return str(caught.value)


def same(values: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


# --- what each does ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_cast_is_torchs(name: str) -> None:
    values = torch.tensor([0, 1, 2, 100])
    cast = done(Cast(DTYPES[name]), values)
    assert cast.dtype is DTYPES[name]
    assert cast.view(torch.uint8).tolist() == values.to(DTYPES[name]).view(torch.uint8).tolist()


def test_cast_cuts_fractions_off_and_keeps_nan_in_floats() -> None:
    same(done(Cast(torch.int64), torch.tensor([1.9, -1.9])), torch.tensor([1, -1]))
    same(done(Cast(torch.float64), torch.tensor([torch.nan])), torch.tensor([torch.nan]).double())


@pytest.mark.parametrize(
    ("values", "dtype", "says"),
    [
        (torch.tensor([256]), torch.uint8, "256 is beyond uint8"),
        (torch.tensor([-1.0]), torch.uint8, "-1 is beyond uint8"),
        (torch.tensor([2.0**63]), torch.int64, "is beyond int64"),
        (torch.tensor([2**64 - 1], dtype=torch.uint64), torch.int64, "is beyond int64"),
        (torch.tensor([torch.nan]), torch.int64, "nan or inf, which no whole number can be"),
        (torch.tensor([torch.inf]), torch.int32, "nan or inf"),
        (torch.tensor([1j]), torch.float32, "complex64[1], which real numbers cannot hold"),
    ],
)
def test_cast_refuses_what_does_not_fit(
    values: torch.Tensor, dtype: torch.dtype, says: str
) -> None:
    assert says in refusal(Cast(dtype), values)


def test_scale_is_a_factor_and_an_offset() -> None:
    same(done(Scale(), PIXELS), PIXELS.float())
    same(done(Scale(0.5, 1), TABLE), TABLE * 0.5 + 1)
    same(
        done(Scale((2, 3), (1, 0)), TABLE), TABLE * torch.tensor([2.0, 3]) + torch.tensor([1.0, 0])
    )
    same(done(Scale(2), TABLE.double()), TABLE.double() * 2)
    same(done(Scale(2, 1), torch.arange(3)), torch.tensor([1.0, 3, 5]))


def test_normalise_takes_given_numbers_a_column() -> None:
    mean, std = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 8])
    expected = (PIXELS.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    same(done(Normalise(mean.tolist(), std.tolist()), PIXELS), expected)
    same(done(Normalise(0.5, 0.25), TABLE), (TABLE - 0.5) / 0.25)


def test_normalise_auto_is_that_of_the_rows() -> None:
    values = done(Normalise("auto", "auto"), TABLE)
    torch.testing.assert_close(values[:, 0].mean(), torch.tensor(0.0))
    torch.testing.assert_close(values[:, 0].std(correction=0), torch.tensor(1.0))
    same(values[:, 1], torch.zeros(3))
    channels = done(Normalise("auto", "auto"), PIXELS).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(channels.std(1, correction=0), torch.ones(3))
    torch.testing.assert_close(done(Normalise("auto", 1.0), torch.arange(3)), torch.arange(-1.0, 2))


@pytest.mark.parametrize(
    ("transform", "values", "says"),
    [
        (Normalise(0, 0), TABLE, "std has to be above 0"),
        (Normalise(0, (1, -1)), TABLE, "std has to be above 0"),
        (Normalise((1, 2, 3), 1), TABLE, "3 numbers do not fit float32[3, 2]: one a column"),
        (Scale((1, 2)), torch.arange(2), "2 numbers do not fit float32[2]"),
        (Normalise("auto", 1), torch.tensor([1, torch.nan]), "it has nan or inf, so it has no"),
        (Scale(2), torch.tensor([1j]), "it is complex64[1]; split it into real numbers"),
    ],
)
def test_numbers_that_do_not_fit_are_told(
    transform: Transform, values: torch.Tensor, says: str
) -> None:
    assert says in refusal(transform, values)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.uint16])
def test_one_hot_is_torchs_as_float32(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, 2], [1, 1]])
    same(done(OneHot(4), labels.to(dtype)), functional.one_hot(labels, 4).float())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (torch.tensor([0, 3]), "3 is no class of 3 (0 to 2)"),
        (torch.tensor([-1]), "-1 is no class of 3"),
        (torch.tensor([1.0]), "it is float32[1]; cast it to int64 first"),
        (torch.tensor([True]), "it is bool[1]"),
    ],
)
def test_one_hot_refuses_what_is_no_class(values: torch.Tensor, says: str) -> None:
    assert says in refusal(OneHot(3), values)


def test_shapes_are_torchs() -> None:
    same(done(Flatten(), PIXELS), PIXELS.flatten(1))
    same(done(Flatten(), torch.arange(3)), torch.arange(3).view(3, 1))
    same(done(Reshape((4, -1)), PIXELS), PIXELS.reshape(2, 4, 6))
    same(done(Select((2, 0)), PIXELS), PIXELS[:, [2, 0]])
    same(done(FillNan(7), torch.tensor([1, torch.nan, torch.inf])), torch.tensor([1, 7, torch.inf]))
    same(done(FillNan(7), torch.arange(3)), torch.arange(3))


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (Reshape((5,)), "reshape of field 'x': rows of uint8[2, 3, 2, 4] cannot have the shape 5"),
        (Reshape((-1, -1)), "cannot have the shape -1, -1"),
        (Reshape((2**70,)), "cannot have the shape"),
        (Select((0, 3)), "there is no column 3; there are 0 to 2"),
        (Select((-1,)), "there is no column -1"),
    ],
)
def test_shapes_that_do_not_fit_are_told(transform: Transform, says: str) -> None:
    assert says in refusal(transform, PIXELS)
    assert "which has no columns" in refusal(Select((0,)), torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_resize_is_torchs_smoothed_interpolation(dtype: torch.dtype) -> None:
    images = PIXELS.to(dtype)
    expected = functional.interpolate(images, (5, 3), mode="bilinear", antialias=True)
    torch.testing.assert_close(done(Resize((5, 3)), images), expected)
    same(done(Resize((2, 4)), images), images)


@pytest.mark.parametrize("values", [TABLE, PIXELS.int(), PIXELS[0], PIXELS[:, :, :0]])
def test_resize_refuses_what_is_no_image(values: torch.Tensor) -> None:
    assert refusal(Resize((2, 2)), values).startswith("resize of field 'x': it is ")


def test_fields_are_renamed_dropped_and_made_in_their_place() -> None:
    before = {"a": TABLE, "b": Texts(["é"]), "c": TABLE}
    steps: list[tuple[str, Transform]] = [("b", Tokenise("bytes", 3)), ("c", Rename("d"))]
    after = transformed(dict(before), [*steps, ("a", Drop())])
    assert list(after) == ["tokens", "lengths", "d"]
    assert list(before) == ["a", "b", "c"]
    assert list(transformed(dict(before), steps)) == ["a", "tokens", "lengths", "d"]
    same(after["tokens"], torch.tensor([[0xC3 + 1, 0xA9 + 1, 0]]))  # type: ignore[arg-type]


def test_a_field_that_is_there_already_is_not_replaced() -> None:
    with pytest.raises(Unfit, match="rename of field 'a': there is a field 'b' already"):
        transformed({"a": TABLE, "b": TABLE}, [("a", Rename("b"))])
    with pytest.raises(Unfit, match="there is a field 'lengths' already"):
        transformed({"a": Texts([""]), "lengths": TABLE}, [("a", Tokenise("bytes", 3))])
    assert list(transformed({"a": TABLE}, [("a", Rename("a"))])) == ["a"]


def test_an_unknown_field_is_told_with_those_there_are() -> None:
    with pytest.raises(Unfit, match="there is no field 'z'; there is 'a', 'b'"):
        transformed({"a": TABLE, "b": TABLE}, [("z", Drop())])


def test_text_and_sparse_tensors_are_told() -> None:
    for transform in (Cast(torch.int64), Scale(), Flatten(), OneHot(3), Resize((1, 1)), FillNan(0)):
        assert "it is text; make it token ids" in refusal(transform, Texts(["a"]))
        assert "it is sparse" in refusal(transform, torch.eye(2).to_sparse())
    assert "it is no text" in refusal(Tokenise("bytes", 3), TABLE)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_MEMORY", 10_000)
    for transform, values in ((OneHot(10**6), torch.tensor([1])), (Resize((999, 999)), PIXELS)):
        with pytest.raises(MemoryError):
            done(transform, values)


def test_transforms_are_a_closed_table_of_frozen_values() -> None:
    with pytest.raises(TypeError):
        TRANSFORMS["eval"] = Drop  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rename("a").to = "b"  # type: ignore[misc]


# --- how they are written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cast:float32", Cast(torch.float32)),
        ("cast:dtype=int64", Cast(torch.int64)),
        ("scale", Scale()),
        ("scale:", Scale()),
        ("scale:1/255", Scale(1 / 255)),
        ("scale:offset=-1,factor=2e-1", Scale(0.2, -1.0)),
        ("scale:1,2,offset=3", Scale((1.0, 2.0), 3.0)),
        ("normalise:mean=0.5,std=0.25", Normalise(0.5, 0.25)),
        ("normalise:mean=0.4,0.5,std=0.2,0.3", Normalise((0.4, 0.5), (0.2, 0.3))),
        ("normalise:auto,std=auto", Normalise("auto", "auto")),
        ("one_hot:10", OneHot(10)),
        ("flatten", Flatten()),
        ("reshape:1,28,-1", Reshape((1, 28, -1))),
        ("select:0,2", Select((0, 2))),
        ("rename:labels", Rename("labels")),
        ("drop", Drop()),
        ("resize:28", Resize((28, 28))),
        ("resize:28,14", Resize((28, 14))),
        ("fill_nan:-1", FillNan(-1.0)),
        ("tokenise:bytes,length=8", Tokenise("bytes", 8)),
        ("tokenise:length=8,tokeniser=/a b/t.json", Tokenise("/a b/t.json", 8)),
    ],
)
def test_a_transform_is_a_name_and_parameters(text: str, expected: Transform) -> None:
    assert parse_transform(f"scans/x={text}") == ("scans", [("x", expected)])


def test_every_transform_can_be_written() -> None:
    written = {
        "cast:float32 | scale | normalise:0,std=1 | one_hot:2 | flatten | reshape:1 | select:0",
        "resize:2 | fill_nan:0 | tokenise:bytes,length=1 | rename:y | drop",
    }
    kinds = {type(step) for text in written for _, step in parse_transform(f"scans/x={text}")[1]}
    assert kinds == set(TRANSFORMS.values())


def test_several_are_one_after_the_other_and_a_new_name_is_followed() -> None:
    assert parse_transform("a.b/my x=flatten|rename:y | cast:bool") == (
        "a.b",
        [("my x", Flatten()), ("my x", Rename("y")), ("y", Cast(torch.bool))],
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *((text, "not NAME/FIELD=TRANSFORM") for text in ("", "scans", "scans=cast:bool")),
        *((text, "not NAME/FIELD=TRANSFORM") for text in ("/x=drop", "scans/=drop", "scans/x")),
        ("scans/x=", "there is no transform ''; there is cast, drop, fill_nan, flatten"),
        ("scans/x=eval:1", "there is no transform 'eval'"),
        ("scans/x=drop|", "there is no transform ''"),
        ("scans/x=cast", "cast needs dtype, such as cast:float32"),
        ("scans/x=normalise", "normalise needs mean and std, such as normalise:mean=0.5,std=0.25"),
        ("scans/x=normalise:0.5", "normalise needs std"),
        ("scans/x=cast:float33", "dtype=float33 has to be one of bool, uint8"),
        ("scans/x=cast:float32,int8", "dtype=float32,int8 has to be one of"),
        ("scans/x=cast:kind=int8", "cast has no parameter 'kind'; it has dtype"),
        ("scans/x=flatten:2", "flatten has no parameter '2'; it has none"),
        ("scans/x=cast:int8,dtype=int8", "cast: dtype is given twice"),
        ("scans/x=scale:x", "factor=x has to be numbers, such as 0.5 or 1/255"),
        ("scans/x=scale:1/0", "has to be numbers"),
        ("scans/x=scale:nan", "has to be numbers"),
        ("scans/x=fill_nan:1,2", "value=1,2 has to be one number"),
        ("scans/x=one_hot:0", "classes=0 has to be one whole number from 1"),
        ("scans/x=one_hot:3.5", "has to be whole numbers"),
        ("scans/x=resize:0", "size=0 has to be a side, or height and width"),
        ("scans/x=resize:1,2,3", "has to be a side, or height and width"),
        ("scans/x=reshape:a", "shape=a has to be whole numbers"),
        ("scans/x=rename:a,b", "to=a,b has to be one word"),
        ("scans/x=rename:to=", "to= has to be one word"),
        ("scans/x=tokenise:bytes", "tokenise needs length"),
        ("scans/x=tokenise:bytes,length=" + "9" * 5000, "has to be whole numbers"),
    ],
)
def test_a_transform_of_another_form_is_told(text: str, says: str) -> None:
    with pytest.raises(DatasetError) as caught:
        parse_transform(text)
    assert says in caught.value.reason
    assert caught.value.path == text


@given(steps=st.text(alphabet="abcdefnorstx_:=,|/.0123456789-", max_size=30))
def test_any_text_is_a_transform_or_refused(steps: str) -> None:
    for start in ("", "cast:", "normalise:", "resize:", "tokenise:bytes,"):
        with contextlib.suppress(DatasetError):
            parse_transform(f"scans/x={start}{steps}")
