"""The owner's files: what is loaded, what is refused with what advice, how batches are cut."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import wsfed
from wsfed.errors import DatasetError, QuotaExceeded
from wsfed.worker.datasets import Dataset, load, parse_option, parse_split
from wsfed.worker.providers import Provider
from wsfed.worker.transforms import Cast, Rename

IMAGES = torch.arange(12.0).reshape(4, 3)
LABELS = torch.tensor([3, 1, 2, 0])


def write_npz(path: Path) -> None:
    np.savez(path, images=IMAGES.numpy(), labels=LABELS.numpy())


def write_safetensors(path: Path) -> None:
    save_file({"images": IMAGES, "labels": LABELS}, path)


def write_parquet(path: Path) -> None:
    columns = {"images": IMAGES.tolist(), "labels": LABELS.tolist()}
    pq.write_table(pa.table(columns, pa.schema(PARQUET)), path)


PARQUET = {"images": pa.list_(pa.float32(), 3), "labels": pa.int64()}


def write_pt(path: Path) -> None:
    torch.save({"images": IMAGES, "labels": LABELS}, path)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".npz": write_npz,
    ".safetensors": write_safetensors,
    ".parquet": write_parquet,
    ".pt": write_pt,
}

SUFFIXES = [".npz", ".safetensors", ".csv", ".pt", ".parquet", ".txt"]


def csv_of(folder: Path, text: str) -> Dataset:
    path = folder / "rows.csv"
    path.write_text(text)
    return load("rows", path)


def refusal(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        load("rows", path)
    assert caught.value.path == str(path)
    return caught.value.reason


# --- what is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("opened", [False, True])
def test_fields_keep_names_values_and_dtypes(tmp_path: Path, suffix: str, opened: bool) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    rows = load("rows", path, open=opened)
    assert (rows.name, rows.rows, rows.open) == ("rows", 4, opened)
    assert set(rows.fields) == {"images", "labels"}
    for name, expected in (("images", IMAGES), ("labels", LABELS)):
        torch.testing.assert_close(rows.fields[name], expected, rtol=0, atol=0)


def test_the_suffix_may_be_in_capitals_and_the_path_a_text(tmp_path: Path) -> None:
    path = tmp_path / "ROWS.PT"
    write_pt(path)
    assert load("rows", str(path)).rows == 4


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_is_loaded_is_aligned_memory_of_its_own(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    rows = load("rows", path)
    os.truncate(path, 0)
    assert torch.equal(rows.fields["images"], IMAGES)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in rows.fields.values())


def test_a_view_in_a_file_does_not_bring_what_is_behind_it(tmp_path: Path) -> None:
    whole = torch.zeros(1000, 2)
    torch.save({"x": whole[:3], "y": whole[:3, 0]}, tmp_path / "rows.pt")
    rows = load("rows", tmp_path / "rows.pt")
    assert rows.fields["x"].untyped_storage().nbytes() == 3 * 2 * 4
    assert rows.fields["x"].data_ptr() != rows.fields["y"].data_ptr()
    assert all(tensor.is_contiguous() for tensor in rows.fields.values())


def test_one_tensor_is_data_and_a_list_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "rows.pt"
    torch.save(torch.ones(3, 2, requires_grad=True), path)
    (data,) = load("rows", path).fields.values()
    assert list(load("rows", path).fields) == ["data"]
    assert not data.requires_grad
    for kind in (list, tuple):
        torch.save(kind((IMAGES, LABELS)), path)
        assert list(load("rows", path).fields) == ["0", "1"]


def test_numbers_in_the_other_byte_order_are_turned(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.arange(3, dtype=">i4"))
    assert load("rows", tmp_path / "rows.npz").fields["x"].tolist() == [0, 1, 2]


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["label", " Label ", "labels", "target", "y", "Y"])
def test_a_column_with_the_name_of_labels_becomes_them(tmp_path: Path, column: str) -> None:
    rows = csv_of(tmp_path, f"age,{column},dose\n1,7,2.5\n3,8,4.5\n")
    assert list(rows.fields) == ["features", "labels"]
    assert torch.equal(rows.fields["features"], torch.tensor([[1, 2.5], [3, 4.5]]))
    assert torch.equal(rows.fields["labels"], torch.tensor([7, 8]))


def test_the_most_telling_name_wins(tmp_path: Path) -> None:
    rows = csv_of(tmp_path, "x,y,label\n1,2,0\n3,4,1\n")
    assert torch.equal(rows.fields["features"], torch.tensor([[1.0, 2], [3, 4]]))
    assert rows.fields["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("value", ["0.5", "nan", "inf", "1e300"])
def test_labels_that_are_no_whole_numbers_are_float32(tmp_path: Path, value: str) -> None:
    labels = csv_of(tmp_path, f"x,y\n1,1\n2,{value}\n").fields["labels"]
    torch.testing.assert_close(labels, torch.tensor([1, float(value)]), equal_nan=True)


def test_a_table_without_names_is_all_features(tmp_path: Path) -> None:
    rows = csv_of(tmp_path, "1,2\r\n\r\n3,4\r\n")
    assert list(rows.fields) == ["features"]
    assert torch.equal(rows.fields["features"], torch.tensor([[1.0, 2], [3, 4]]))


def test_a_first_row_with_a_missing_value_is_a_row(tmp_path: Path) -> None:
    assert csv_of(tmp_path, "nan,1\n2,3\n").rows == 2


def test_a_byte_order_mark_and_quotes_are_understood(tmp_path: Path) -> None:
    rows = csv_of(tmp_path, '\ufeff"label","a, b"\n"1","2"\n')
    assert rows.fields["labels"].tolist() == [1]
    assert rows.fields["features"].tolist() == [[2]]


def test_a_table_may_hold_nothing_but_labels(tmp_path: Path) -> None:
    assert list(csv_of(tmp_path, "label\n1\n").fields) == ["labels"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        ("a,b\n", "a header and no rows"),
        ("nan,nan\n1,2\n", "line 1 is nothing but nan"),
        ("a,b\n1,2\n1\n", "line 3 has 1 columns where the first has 2"),
        ("a,b\n1,\n", "line 2: '' is no number"),
        ("a,b\nnan,abc\n", "line 2: 'abc' is no number"),
        ("a;b\n1;2\n", "separate columns by commas"),
        ("5.1,3.5,setosa\n4.9,3.0,setosa\n", "'setosa' is no number"),
    ],
)
def test_a_malformed_table_is_told_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    assert says in refusal(tmp_path / "rows.csv")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_and_an_empty_folder_are_told(tmp_path: Path, suffix: str) -> None:
    assert refusal(tmp_path / f"missing{suffix}") == "there is no such file"
    (tmp_path / f"folder{suffix}").mkdir()
    assert refusal(tmp_path / f"folder{suffix}").startswith("there is no image in it")


@pytest.mark.parametrize("name", ["rows.xls", "rows"])
def test_an_unknown_suffix_is_told_with_the_known_ones(tmp_path: Path, name: str) -> None:
    says = "is not one of .csv .npz .pt .safetensors .parquet .txt, and it is no folder"
    assert says in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe\x80" * 9, b"PK\x03\x04 cut off"])
def test_garbage_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    assert refusal(path)


@pytest.mark.parametrize("suffix", WRITERS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_bytes_load_or_are_refused(
    tmp_path: Path, suffix: str, place: float, byte: int, cut: bool
) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    content = bytearray(path.read_bytes())
    index = int(place * len(content))
    content[index] = byte
    path.write_bytes(content[:index] if cut else content)
    with contextlib.suppress(DatasetError):
        load("rows", path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.array([Bomb()], dtype=object))
    assert "never unpickled" in refusal(tmp_path / "rows.npz")
    for content in (pickle.dumps({"x": Bomb()}), pickle.dumps({"x": [1, 2]})):
        (tmp_path / "rows.pt").write_bytes(content)
        assert refusal(tmp_path / "rows.pt")
    torch.save({"x": Bomb()}, tmp_path / "rows.pt")
    assert refusal(tmp_path / "rows.pt").startswith("it holds more than tensors")


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return pytest.fail, ("a file from outside was executed",)


@pytest.mark.parametrize("value", [{"x": 1}, 3, {"x": IMAGES, "epoch": 3}, [IMAGES, "text"]])
def test_a_file_of_other_things_than_tensors_is_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "rows.pt")
    assert refusal(tmp_path / "rows.pt") == (
        "it is no tensor, and no dictionary or list of nothing but tensors"
    )


def test_an_array_without_a_name_and_a_member_that_is_none_are_told(tmp_path: Path) -> None:
    with (tmp_path / "rows.npz").open("wb") as file:
        np.save(file, IMAGES.numpy())
    assert "one array without a name" in refusal(tmp_path / "rows.npz")
    with zipfile.ZipFile(tmp_path / "rows.npz", "w") as archive:
        archive.writestr("readme.txt", "rows")
    assert "'readme.txt' in it is no array" in refusal(tmp_path / "rows.npz")


@pytest.mark.parametrize("dtype", ["U3", "M8[s]", "V4"])
def test_arrays_that_are_no_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "rows.npz", x=np.zeros(2, dtype))
    assert "field 'x' is" in refusal(tmp_path / "rows.npz")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "there is no field in it"),
        ({"x": torch.zeros(0, 2)}, "it has no rows"),
        ({"x": torch.tensor(1.0)}, "field 'x' is one number; a field has rows"),
        ({"x": torch.zeros(3), "y": torch.zeros(2)}, "x has 3, y has 2"),
        ({"x": torch.eye(3).to_sparse()}, "field 'x' (float32, sparse_coo) cannot be sent"),
    ],
)
def test_tensors_that_make_no_rows_are_refused(
    tmp_path: Path, fields: dict[str, torch.Tensor], says: str
) -> None:
    torch.save(fields, tmp_path / "rows.pt")
    assert says in refusal(tmp_path / "rows.pt")
    with pytest.raises(DatasetError, match="rows: "):
        Dataset("rows", fields)


@pytest.mark.parametrize("name", ["", "a b", "../etc", "-x", "n" * 65])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(DatasetError, match="letters, digits"):
        Dataset(name, {"x": IMAGES})


def test_a_missing_library_is_told_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(tmp_path / "rows.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install 'wsfed[safetensors]'" in refusal(tmp_path / "rows.safetensors")


# --- the option of the command line --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits=digits.npz", ("digits", Path("digits.npz"))),
        ("a.b-c_1=/data/x=y.csv", ("a.b-c_1", Path("/data/x=y.csv"))),
        ("rows=~/rows.pt", ("rows", Path.home() / "rows.pt")),
    ],
)
def test_an_option_is_a_name_and_a_path(text: str, expected: tuple[str, Path]) -> None:
    assert parse_option(text) == expected


def test_an_option_may_name_a_function_of_the_owners() -> None:
    assert parse_option("rows=python:clinic.rows:scans") == (
        "rows",
        Provider("clinic.rows", "scans"),
    )
    for text in (
        "python:clinic",
        "python:clinic:",
        "python::scans",
        "python:a-b:c",
        "python:a:b.c",
    ):
        with pytest.raises(ValueError, match="is not python:MODULE:FUNCTION"):
            parse_option(f"rows={text}")


@pytest.mark.parametrize("text", ["digits", "digits=", "=digits.npz", "a b=x.npz", ""])
def test_an_option_of_another_form_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=PATH"):
        parse_option(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scans=0.2", ("scans", 0.2, 0)),
        ("a.b-c=.5,seed=7", ("a.b-c", 0.5, 7)),
        ("scans=2e-1,seed=0", ("scans", 0.2, 0)),
    ],
)
def test_a_split_is_a_name_a_fraction_and_a_seed(
    text: str, expected: tuple[str, float, int]
) -> None:
    assert parse_split(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "scans", "scans=", "=0.2", "scans=0", "scans=1", "scans=1.5", "scans=-0.2"),
        *("scans=nan", "scans=x", "scans=0.2,7", "scans=0.2,seed=", "scans=0.2,seed=x"),
        *("scans=0.2,seed=-1", f"scans=0.2,seed={2**63}", "a b=0.2", "scans=0.2,seed=1,seed=2"),
    ],
)
def test_a_split_of_another_form_is_told(text: str) -> None:
    with pytest.raises(DatasetError, match="is not NAME=FRACTION") as caught:
        parse_split(text)
    assert caught.value.path == text


# --- transforms ----------------------------------------------------------------------------------


def test_transforms_are_done_while_a_file_is_loaded(tmp_path: Path) -> None:
    write_npz(tmp_path / "rows.npz")
    steps = [("images", Cast(torch.float64)), ("images", Rename("x"))]
    rows = load("rows", tmp_path / "rows.npz", transforms=steps)
    assert list(rows.fields) == ["x", "labels"]
    assert torch.equal(rows.fields["x"], IMAGES.to(torch.float64))


def test_a_field_that_is_not_there_is_told_with_the_file(tmp_path: Path) -> None:
    write_npz(tmp_path / "rows.npz")
    with pytest.raises(
        DatasetError, match="no field 'image'; there is 'images', 'labels'"
    ) as caught:
        load("rows", tmp_path / "rows.npz", transforms=[("image", Rename("x"))])
    assert caught.value.path == str(tmp_path / "rows.npz")


# --- training and validation ---------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(-3, 5), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**53),
    kind=st.sampled_from([torch.int64, torch.float32]),
)
def test_each_row_is_in_one_part_and_each_class_has_its_share(
    labels: list[int], fraction: float, seed: int, kind: torch.dtype
) -> None:
    count = len(labels)
    targets = torch.tensor(labels, dtype=kind)
    data = Dataset("rows", {"x": torch.arange(count), "labels": targets})
    expected = round(count * Fraction(str(fraction)))
    if expected in (0, count):
        with pytest.raises(DatasetError, match=r"leaves no row to (train|validate) with"):
            data.split(fraction, seed)
        return
    train, validation = data.split(fraction, seed)
    assert (train.name, validation.name) == ("rows", "rows-validation")
    assert validation.rows == expected
    x, y = train.fields["x"].tolist(), validation.fields["x"].tolist()
    assert sorted(x + y) == list(range(count))
    assert x == sorted(x) and y == sorted(y)
    for part in (train, validation):
        assert torch.equal(part.fields["labels"], targets[part.fields["x"]])
    if kind is torch.int64:
        for label in set(labels):
            share = labels.count(label) * fraction
            assert abs(int((validation.fields["labels"] == label).sum()) - share) < 1 + 1e-9
    again = data.split(fraction, seed)
    for one, other in zip((train, validation), again, strict=True):
        assert torch.equal(one.fields["x"], other.fields["x"])


def test_shares_without_rest_are_exact() -> None:
    labels = torch.arange(100) % 10
    for fraction, each in ((0.1, 1), (0.3, 3), (0.7, 7)):
        _, validation = Dataset("rows", {"labels": labels}).split(fraction, 3)
        assert validation.fields["labels"].bincount().tolist() == [each] * 10


def test_labels_that_are_all_different_do_not_decide_who_validates() -> None:
    labels = torch.arange(1000)
    _, validation = Dataset("rows", {"labels": labels}).split(0.1, 0)
    plain = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:100]
    assert torch.equal(validation.fields["labels"], plain.sort().values)


def test_another_seed_draws_other_rows_and_both_parts_are_copies() -> None:
    rows = torch.arange(100.0)
    data = Dataset("rows", {"x": rows}, open=True)
    one, other = data.split(0.5, 0), data.split(0.5, 1)
    assert not torch.equal(one[1].fields["x"], other[1].fields["x"])
    assert one[0].open and one[1].open
    one[0].fields["x"].zero_()
    assert torch.equal(rows, torch.arange(100.0))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_fraction_that_is_none_is_told(fraction: float) -> None:
    with pytest.raises(DatasetError, match="between 0 and 1"):
        Dataset("rows", {"x": IMAGES}).split(fraction)


def test_a_name_too_long_for_its_validation_rows_is_told() -> None:
    with pytest.raises(DatasetError, match="64 at most"):
        Dataset("n" * 60, {"x": IMAGES}).split(0.5)


async def test_a_worker_offers_both_parts() -> None:
    parts = Dataset("rows", {"x": torch.arange(10)}, open=True).split(0.2, 7)
    async with wsfed.VirtualWorker("bob", datasets=parts) as bob:
        train, validation = await bob.dataset("rows"), await bob.dataset("rows-validation")
        x, y = await train["x"].get(), await validation["x"].get()
    assert sorted(torch.cat([x, y]).tolist()) == list(range(10))


# --- batches -------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 50),
    seed=st.none() | st.integers(0, 2**53 - 1),
)
def test_batches_are_those_that_plain_torch_makes(rows: int, size: int, seed: int | None) -> None:
    x, y = torch.arange(rows * 2.0).reshape(rows, 2), torch.arange(rows)
    data = Dataset("rows", {"x": x, "y": y})
    order = torch.arange(rows)
    if seed is not None:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    for index, chosen in enumerate(order.split(size)):
        batch = data.batch(seed, size, index)
        assert torch.equal(batch[0], x[chosen])
        assert torch.equal(batch[1], y[chosen])
    with pytest.raises(IndexError, match=f"{rows} rows have no batch"):
        data.batch(seed, size, len(order.split(size)))


@pytest.mark.parametrize(("size", "index"), [(0, 0), (-1, 0), (2, -1), (2, 2)])
def test_a_batch_that_does_not_exist_is_told(size: int, index: int) -> None:
    with pytest.raises(IndexError, match="4 rows have no batch"):
        Dataset("rows", {"x": IMAGES}).batch(None, size, index)


@pytest.mark.parametrize("seed", [None, 0])
def test_writing_into_a_batch_does_not_change_the_rows(seed: int | None) -> None:
    rows = torch.nn.Parameter(IMAGES.t().contiguous().t())
    data = Dataset("rows", {"x": rows})
    (batch,) = data.batch(seed, 4, 0)
    assert not batch.requires_grad
    assert batch.is_contiguous()
    batch.zero_()
    assert torch.equal(rows, IMAGES)


def test_orders_are_made_once_and_only_the_last_ones_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    permute = torch.randperm

    def counted(rows: int, generator: torch.Generator) -> torch.Tensor:
        made.append(generator.initial_seed())
        return permute(rows, generator=generator)

    monkeypatch.setattr(torch, "randperm", counted)
    data = Dataset("rows", {"x": IMAGES})
    for _ in range(3):
        for seed in range(8):
            data.batch(seed, 2, 1)
    assert made == list(range(8))
    data.batch(100, 2, 0)
    data.batch(7, 2, 0)
    assert made == [*range(8), 100]
    data.batch(0, 2, 0)
    assert made == [*range(8), 100, 0]


def test_threads_of_several_sessions_get_their_own_orders() -> None:
    data = Dataset("rows", {"x": torch.arange(100)})
    wrong: list[int] = []

    def read(seed: int) -> None:
        expected = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
        batches = (data.batch(seed, 100, 0)[0] for _ in range(20))
        wrong.extend(seed for batch in batches if not torch.equal(batch, expected))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_data_set_is_itself_and_shows_no_order() -> None:
    data = Dataset("rows", {"x": IMAGES})
    assert data == data
    assert data != Dataset("rows", {"x": IMAGES})
    assert len({data, data}) == 1
    assert data.row_bytes() == 3 * 4
    with pytest.raises(TypeError):
        data.fields["x"] = IMAGES  # type: ignore[index]


async def test_what_one_client_writes_into_rows_another_does_not_see() -> None:
    data = Dataset("rows", {"x": IMAGES.clone()}, open=True)
    async with (
        wsfed.Node("bob", datasets=[data]) as node,
        node.listen() as url,
        wsfed.connect(url) as one,
        wsfed.connect(url) as other,
    ):
        mine = (await one.dataset("rows"))["x"]
        mine.add_(100)
        assert torch.equal(await mine.get(), IMAGES + 100)
        assert torch.equal(await (await other.dataset("rows"))["x"].get(), IMAGES)
    assert torch.equal(data.fields["x"], IMAGES)


async def test_a_batch_that_is_too_large_for_the_session_is_refused() -> None:
    data = Dataset("rows", {"x": torch.zeros(1000, 10)}, open=True)
    async with wsfed.VirtualWorker("bob", datasets=[data], max_memory=8000) as bob:
        rows = await bob.dataset("rows")
        (small,) = rows.batch(100, 0)
        assert (await small.get()).shape == (100, 10)
        with pytest.raises(QuotaExceeded, match="above the 8,000 of this session"):
            await rows["x"].get()


def test_a_data_set_shows_no_value() -> None:
    assert "7" not in repr(Dataset("rows", {"x": torch.full((2,), 7.0)}))
