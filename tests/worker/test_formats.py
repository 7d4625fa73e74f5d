"""Tables in Parquet, and texts."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsfed.errors import DatasetError
from wsfed.worker import columns
from wsfed.worker.datasets import Dataset, load
from wsfed.worker.transforms import Tokenise


def parquet_of(folder: Path, table: dict[str, Any] | pa.Table, **options: Any) -> Dataset:
    path = folder / "rows.parquet"
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return load("rows", path)


def refusal(folder: Path, table: dict[str, Any] | pa.Table) -> str:
    with pytest.raises(DatasetError) as caught:
        parquet_of(folder, table)
    assert caught.value.path == str(folder / "rows.parquet")
    return caught.value.reason


# --- Parquet: single numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("column", ["label", " Label ", "labels", "target", "y", "Y"])
def test_columns_become_what_those_of_csv_do(tmp_path: Path, column: str) -> None:
    rows = parquet_of(tmp_path, {"age": [1, 3], column: [7, 8], "dose": [2.5, None]})
    (tmp_path / "rows.csv").write_text(f"age,{column},dose\n1,7,2.5\n3,8,nan\n")
    same = load("rows", tmp_path / "rows.csv")
    assert list(rows.fields) == list(same.fields) == ["features", "labels"]
    for name, expected in same.fields.items():
        torch.testing.assert_close(rows.fields[name], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()),
        *(pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_()),
    ],
)
def test_numbers_of_every_kind_are_features_and_labels(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(np.array([0, 1], kind.to_pandas_dtype()), kind)
    rows = parquet_of(tmp_path, pa.table({"x": values, "y": values}))
    assert torch.equal(rows.fields["features"], torch.tensor([[0.0], [1.0]]))
    assert torch.equal(rows.fields["labels"], torch.tensor([0, 1]))


def test_missing_labels_are_nan(tmp_path: Path) -> None:
    for kind in (pa.int64(), pa.bool_(), pa.float32()):
        labels = pa.array([1, None], kind) if kind != pa.bool_() else pa.array([True, None])
        rows = parquet_of(tmp_path, pa.table({"label": labels}))
        torch.testing.assert_close(
            rows.fields["labels"], torch.tensor([1, torch.nan]), equal_nan=True
        )


def test_row_groups_and_compression_change_nothing(tmp_path: Path) -> None:
    table = {"x": list(range(100)), "list": [[row, -row] for row in range(100)]}
    for compression in ("none", "snappy", "zstd", "gzip"):
        rows = parquet_of(tmp_path, table, row_group_size=7, compression=compression)
        assert rows.fields["features"].flatten().tolist() == table["x"]
        assert rows.fields["list"].tolist() == table["list"]


def test_row_numbers_of_pandas_are_no_feature(tmp_path: Path) -> None:
    rows = parquet_of(tmp_path, {"x": [1.0, 2.0], "__index_level_0__": [5, 6]})
    assert torch.equal(rows.fields["features"], torch.tensor([[1.0], [2.0]]))


# --- Parquet: lists ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int16()), pa.large_list(pa.int16()), pa.list_(pa.int16(), 2)]
)
def test_lists_of_one_length_are_a_field(tmp_path: Path, kind: pa.DataType) -> None:
    lists = pa.array([[1, 2], [3, 4], [5, 6]], kind)
    rows = parquet_of(tmp_path, pa.table({"scan": lists, "label": [0, 1, 2], "age": [7, 8, 9]}))
    assert list(rows.fields) == ["scan", "features", "labels"]
    expected = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int16)
    assert torch.equal(rows.fields["scan"], expected)


def test_lists_of_lists_have_a_shape(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    kind = pa.list_(pa.list_(pa.float32()), 3)
    rows = parquet_of(tmp_path, pa.table({"scan": pa.array(values.tolist(), kind)}))
    assert torch.equal(rows.fields["scan"], torch.from_numpy(values))


def test_a_missing_number_in_a_list_is_nan(tmp_path: Path) -> None:
    rows = parquet_of(tmp_path, {"scan": [[1.5, None], [2.0, 3.0]]})
    assert rows.fields["scan"].isnan().tolist() == [[False, True], [False, False]]


def test_a_column_with_a_dot_in_its_name_is_one(tmp_path: Path) -> None:
    rows = parquet_of(tmp_path, {"a.b": [1.0], "a": [2.0]})
    assert rows.fields["features"].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"x": [1], "name": ["Ada"]}, "column 'name' is string, which is no number; encode it"),
        ({"when": pa.array([0], pa.timestamp("ms"))}, "column 'when' is timestamp[ms]"),
        ({"dose": pa.array([1], pa.decimal128(5))}, "column 'dose' is decimal128(5, 0)"),
        ({"x": pa.array(["a"]).dictionary_encode()}, "column 'x' is dictionary"),
        ({"x": pa.array([None])}, "column 'x' is null"),
        ({"x": [{"a": 1}]}, "column 'x' is struct"),
        ({"x": pa.array([b"a"])}, "column 'x' is binary"),
        ({"x": [["a"]]}, "column 'x' is string"),
        ({"x": [[1], [1, 2]]}, "column 'x' has lists of 1 to 2 numbers; make all of them of one"),
        ({"x": [[[1], [2]], [[3], [4, 5]]]}, "column 'x' has lists of 1 to 2 numbers"),
        ({"x": [[1], None]}, "column 'x': a list in it is missing"),
        ({"x": [[1, None]]}, "column 'x': whole numbers in its lists are missing"),
        ({"features": [[1, 2]], "age": [3]}, "its column 'features' has the name of the field"),
        ({"labels": [[1, 2]], "y": [3]}, "its column 'labels' has the name of the field"),
        ({"x": pa.array([], pa.float32())}, "it has no rows"),
        ({"x": pa.array([], pa.list_(pa.float32()))}, "it has no rows"),
        ({}, "there is no field in it"),
    ],
)
def test_a_column_that_is_no_number_is_told(
    tmp_path: Path, table: dict[str, Any], says: str
) -> None:
    assert says in refusal(tmp_path, table)


def test_two_columns_of_one_name_are_told(tmp_path: Path) -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=["x", "x"])
    assert "two of its columns are called 'x'" in refusal(tmp_path, table)


def test_a_table_that_cannot_fit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "_MEMORY", 1000)
    parquet_of(tmp_path, {"x": [0.0] * 10})
    assert "does not fit" in refusal(tmp_path, {"x": [0.0] * 200})


def test_a_missing_pyarrow_is_told_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_of(tmp_path, {"x": [1]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r"pip install 'wsfed\[data\]'"):
        load("rows", tmp_path / "rows.parquet")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_tables_load_or_are_refused(
    tmp_path: Path, place: float, byte: int, cut: bool
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": [1, 2, None], "list": [[1.5], [2.5], [3.5]]}), path)
    content = bytearray(path.read_bytes())
    index = int(place * len(content))
    content[index] = byte
    path.write_bytes(content[:index] if cut else content)
    with contextlib.suppress(DatasetError):
        load("rows", path)


# --- text ----------------------------------------------------------------------------------------


def test_a_document_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufeffüb\r\n\n  \t\nab c\x0bd\u2028e".encode())
    steps = [("text", Tokenise("bytes", length=4))]
    rows = load("notes", path, transforms=steps)
    assert {name: field.tolist() for name, field in rows.fields.items()} == {
        "tokens": [[0xC3 + 1, 0xBC + 1, ord("b") + 1, 0], [ord(each) + 1 for each in "ab c"]],
        "lengths": [3, 4],
    }


def test_text_without_a_tokeniser_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Ada\n")
    with pytest.raises(DatasetError, match="field 'text': it is text; make it token ids, such as"):
        load("notes", tmp_path / "notes.txt")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_documents_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(DatasetError, match="it has no rows"):
        load("notes", tmp_path / "notes.txt", transforms=[("text", Tokenise("bytes", 4))])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
def test_random_bytes_are_text_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with contextlib.suppress(DatasetError):
        rows = load("notes", path, transforms=[("text", Tokenise("bytes", 60))])
        assert 0 < int(rows.fields["lengths"].sum()) <= len(content)


def test_text_in_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes("Zürich\n".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"it is no UTF-8 text .*; convert it"):
        load("notes", tmp_path / "notes.txt")
