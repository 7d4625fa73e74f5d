"""Functions of the owner's that give rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from wsfed.errors import DatasetError
from wsfed.worker import columns
from wsfed.worker.datasets import Dataset, load
from wsfed.worker.providers import Provider
from wsfed.worker.transforms import Cast

Load = Callable[..., Dataset]


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, *rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.rows[index], Exception):
            raise self.rows[index]
        return self.rows[index]


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads what a function of the owner's module gives."""
    (tmp_path / "clinic_rows.py").write_text("def scans():\n    return given\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def load_it(given: object, **options: Any) -> Dataset:
        import clinic_rows  # type: ignore[import-not-found]

        clinic_rows.given = given
        return load("scans", Provider("clinic_rows", "scans"), **options)

    yield load_it
    sys.modules.pop("clinic_rows", None)


def refusal(loads: Load, given: object) -> str:
    with pytest.raises(DatasetError) as caught:
        loads(given)
    assert caught.value.path == "python:clinic_rows:scans"
    return caught.value.reason


# --- what is loaded ------------------------------------------------------------------------------


def test_a_data_set_gets_the_name_of_the_option_and_is_not_open(loads: Load) -> None:
    x = torch.arange(3)
    rows = loads(Dataset("other", {"x": x}, open=True))
    assert (rows.name, rows.open) == ("scans", False)
    rows.fields["x"].zero_()
    assert x.tolist() == [0, 1, 2]
    assert loads(Dataset("other", {"x": x}), open=True).open


def test_tensors_and_arrays_by_name_are_fields(loads: Load) -> None:
    array = np.arange(3, dtype=">i2")[::-1]
    array.flags.writeable = False
    rows = loads({"x": torch.ones(3, 2, requires_grad=True), "y": array})
    assert rows.fields["y"].tolist() == [2, 1, 0]
    assert rows.fields["y"].dtype is torch.int16
    assert not rows.fields["x"].requires_grad


def test_rows_of_a_torch_data_set_are_stacked(loads: Load) -> None:
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    rows = loads(TensorDataset(x, y))
    assert list(rows.fields) == ["0", "1"]
    assert torch.equal(rows.fields["0"], x)
    assert torch.equal(rows.fields["1"], y)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((torch.tensor([1.5]), 3), {"0": torch.tensor([[1.5]] * 2), "1": torch.tensor([3, 3])}),
        (
            [np.float64(2), True],
            {"0": torch.tensor([2.0, 2]).double(), "1": torch.tensor([True] * 2)},
        ),
        ({"x": 0.5}, {"x": torch.tensor([0.5, 0.5])}),
        (np.arange(2), {"data": torch.tensor([[0, 1], [0, 1]])}),
    ],
)
def test_rows_are_tuples_dictionaries_or_tensors(
    loads: Load, row: object, expected: dict[str, torch.Tensor]
) -> None:
    fields = loads(Rows(row, row)).fields
    assert fields.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(fields[name], values, rtol=0, atol=0)


def test_transforms_are_done_to_them_too(loads: Load) -> None:
    rows = loads({"x": np.arange(3)}, transforms=[("x", Cast(torch.float32))])
    assert rows.fields["x"].dtype is torch.float32


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "it gave a NoneType; give a wsfed.Dataset, a dictionary"),
        ([torch.ones(3)], "it gave a list"),
        ({"x": [1, 2]}, "field 'x' is a list; make it a tensor or an array"),
        ({"x": np.array(["a"])}, "field 'x' is an array of <U1; make it numbers"),
        ({"x": np.array([object()])}, "field 'x' is an array of object"),
        ({}, "there is no field in it"),
        ({"x": torch.eye(2).to_sparse()}, "field 'x' (float32, sparse_coo) cannot be sent"),
        (Rows(), "it has no rows"),
        (Rows((1,), (1, 2)), "row 1 has fields 0, 1; row 0 has 0"),
        (
            Rows((torch.ones(2),), (torch.ones(2),), (torch.ones(3),)),
            "row 2, field '0' is float32[3], and in row 0 float32[2]; give all rows one shape",
        ),
        (Rows((1,), (1.0,)), "row 1, field '0' is float32[], and in row 0 int64[]"),
        (Rows((1,), ("a",)), "row 1, field '0' is a str; make it a tensor"),
        (Rows((2**70,)), "row 0, field '0' is a number too large for int64"),
        (Rows((1,), KeyError("lost")), "row 1 raised KeyError: 'lost'"),
        (Rows(torch.eye(2).to_sparse()), "row 0, field 'data' is sparse; make it dense"),
    ],
)
def test_what_makes_no_rows_is_told(loads: Load, given: object, says: str) -> None:
    assert says in refusal(loads, given)


def test_rows_without_a_number_of_them_are_refused(loads: Load) -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("an endless stream was read")

    class Endless(torch.utils.data.Dataset[int]):
        def __getitem__(self, index: int) -> int:
            raise AssertionError("an endless data set was read")

    assert "without a length" in refusal(loads, Stream())
    assert "without a length" in refusal(loads, Endless())


def test_more_rows_than_fit_are_not_read(loads: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_MEMORY", 100)
    assert "does not fit" in refusal(loads, Rows(torch.ones(20), AssertionError("it was read")))


def test_a_function_that_cannot_be_called_is_told(loads: Load, tmp_path: Path) -> None:
    (tmp_path / "clinic_broken.py").write_text(
        "import os\nnumber = 3\ndef scans():\n    raise OSError('the disk is gone')\n"
    )
    (tmp_path / "clinic_needy.py").write_text("import a_library_that_is_missing\n")
    (tmp_path / "clinic_syntax.py").write_text("def scans(:\n")
    (tmp_path / "clinic_needs_more.py").write_text("def scans(path): ...\n")
    for module, function, says in (
        ("clinic_absent", "scans", "there is no module 'clinic_absent' installed or in the folder"),
        ("clinic_absent.rows", "scans", "there is no module 'clinic_absent.rows'"),
        ("clinic_broken", "scan", "module 'clinic_broken' has no function 'scan'"),
        ("clinic_broken", "number", "module 'clinic_broken' has no function 'number'"),
        ("clinic_broken", "scans", "it raised OSError: the disk is gone"),
        ("clinic_needy", "scans", "needs 'a_library_that_is_missing', which is not installed"),
        ("clinic_syntax", "scans", "importing it raised SyntaxError"),
        ("clinic_needs_more", "scans", "it raised TypeError: scans() missing 1 required"),
    ):
        with pytest.raises(DatasetError) as caught:
            load("scans", Provider(module, function))
        assert says in caught.value.reason
        assert caught.value.path == f"python:{module}:{function}"


def test_a_path_is_never_imported(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not one of"):
        load("scans", "python:clinic_rows:scans")
    assert "clinic_rows" not in sys.modules
