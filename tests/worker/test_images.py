"""Folders of images: classes, colours, sizes, and what is broken."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from wsfed.errors import DatasetError
from wsfed.worker import columns
from wsfed.worker.datasets import Dataset, load
from wsfed.worker.transforms import Resize

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def put(folder: Path, name: str, pixels: np.ndarray | Image.Image = GREY) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path)
    return path


def refusal(folder: Path, size: int | None = None) -> str:
    with pytest.raises(DatasetError) as caught:
        folder_of(folder, size)
    assert caught.value.path == str(folder)
    return caught.value.reason


def folder_of(folder: Path, size: int | None = None) -> Dataset:
    steps = [] if size is None else [("images", Resize((size, size)))]
    return load("scans", folder, transforms=steps)


# --- what is loaded ------------------------------------------------------------------------------


def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, "b/2.png", GREY + 2)
    put(tmp_path, "b/1.png", GREY + 1)
    put(tmp_path, "a/9.png", GREY)
    put(tmp_path, "B/0.png", GREY + 3)
    rows = folder_of(tmp_path)
    assert list(rows.fields) == ["images", "labels"]
    assert rows.fields["labels"].tolist() == [0, 1, 2, 2]
    assert rows.fields["labels"].dtype is torch.int64
    expected = np.stack([GREY + 3, GREY, GREY + 1, GREY + 2])[:, None]
    assert torch.equal(rows.fields["images"], torch.from_numpy(expected))


def test_images_are_those_that_pillow_reads(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path, f"cats/{number}.jpg", np.roll(COLOUR, number, 0))
        put(tmp_path, f"dogs/{number}.png", np.roll(COLOUR, number, 1))
    rows = folder_of(tmp_path)
    for row, file in enumerate(sorted(tmp_path.glob("*/*"))):
        image = torch.from_numpy(np.array(Image.open(file)))
        assert torch.equal(rows.fields["images"][row].permute(1, 2, 0), image)
    assert rows.fields["labels"].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_class_without_an_image_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    put(tmp_path, "b/1.png")
    assert folder_of(tmp_path).fields["labels"].tolist() == [1]


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "JPEG", "bmp", "gif"])
def test_each_kind_of_file_is_read(tmp_path: Path, suffix: str) -> None:
    put(tmp_path, f"a/1.{suffix}", np.full((3, 4), 100, np.uint8))
    put(tmp_path, f"a/2.{suffix}", np.full((3, 4, 3), (10, 100, 200), np.uint8))
    images = folder_of(tmp_path).fields["images"]
    assert images.shape == (2, 3, 3, 4)
    assert (images[0].int() - 100).abs().max() <= 2
    assert (images[1].int() - torch.tensor([10, 100, 200]).view(3, 1, 1)).abs().max() <= 2


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)],
)
def test_colour_is_what_the_pixels_can_have(tmp_path: Path, mode: str, channels: int) -> None:
    image = Image.new("RGB", (4, 3), (200, 10, 10)).convert(mode)
    put(tmp_path, "a/1.png", image)
    images = folder_of(tmp_path).fields["images"]
    assert torch.equal(
        images[0],
        torch.from_numpy(np.array(image.convert("RGB" if channels == 3 else "L")))
        .reshape(3, 4, channels)
        .permute(2, 0, 1),
    )


def test_a_grey_palette_is_grey(tmp_path: Path) -> None:
    put(tmp_path, "a/1.gif", GREY)
    images = folder_of(tmp_path).fields["images"]
    assert torch.equal(images, torch.from_numpy(GREY)[None, None])


def test_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((3, 4), value, np.uint8)) for value in (7, 90)]
    (tmp_path / "a").mkdir()
    frames[0].save(tmp_path / "a/1.gif", save_all=True, append_images=frames[1:])
    assert folder_of(tmp_path).fields["images"].unique().tolist() == [7]


def test_hidden_entries_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / ".git").mkdir()
    (tmp_path / "a/.thumbs").write_bytes(b"x")
    assert folder_of(tmp_path).rows == 1


def test_different_sizes_are_resized_as_pillow_does(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number, size in enumerate([(9, 7), (20, 31), (5, 5), (6, 6)]):
        put(tmp_path, f"a/{number}.png", generator.integers(0, 256, (*size, 3), np.uint8))
    images = folder_of(tmp_path, 6).fields["images"]
    assert images.shape == (4, 3, 6, 6)
    for row, file in enumerate(sorted(tmp_path.glob("*/*"))):
        plain = np.array(Image.open(file).resize((6, 6), Image.Resampling.BILINEAR))
        difference = images[row].permute(1, 2, 0).int() - torch.from_numpy(plain).int()
        assert difference.abs().max() <= 1


# --- what is refused -----------------------------------------------------------------------------


def test_the_first_two_of_different_sizes_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png")
    put(tmp_path, "a/2.png")
    put(tmp_path, "b/3.png", GREY[:2])
    put(tmp_path, "b/4.png", GREY[:1])
    assert refusal(tmp_path) == (
        "field 'images': a/1.png is 3 pixels high and 4 wide, b/3.png 2 and 4; resize them, "
        "such as resize:2"
    )
    assert folder_of(tmp_path, 2).rows == 4


def test_a_folder_of_another_form_is_told(tmp_path: Path) -> None:
    assert "there is no image in it; put images in sub-folders" in refusal(tmp_path)
    put(tmp_path, "1.png")
    assert "1.png: images lie in sub-folders, one a class" in refusal(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "a").mkdir()
    assert "there is no image in it" in refusal(tmp_path)
    put(tmp_path, "a/b/1.png")
    assert "a/b: this is a folder inside a class" in refusal(tmp_path)


def test_a_file_that_is_no_image_is_told(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png")
    (tmp_path / "a/notes.txt").write_text("Ada")
    assert refusal(tmp_path).startswith("a/notes.txt: no image (.png .jpg .jpeg .bmp .gif)")


def test_pixels_of_more_than_8_bits_are_not_cut_off_in_silence(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", GREY.astype(np.uint16) * 250)
    assert refusal(tmp_path).startswith("a/1.png: its pixels (I;16) have more than 8 bits")


def test_another_format_behind_the_suffix_is_not_opened(tmp_path: Path) -> None:
    put(tmp_path, "a/1.tiff").rename(tmp_path / "a/1.png")
    assert refusal(tmp_path) == "a/1.png: it is damaged, or none of PNG, JPEG, BMP, GIF"


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif"])
def test_a_broken_file_is_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    path = put(tmp_path, f"a/1.{suffix}", noise)
    put(tmp_path, f"a/0.{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"a/1.{suffix}: it is damaged" in refusal(tmp_path)
    assert f"a/1.{suffix}: it is damaged" in refusal(tmp_path, 8)
    path.write_bytes(b"")
    assert refusal(tmp_path).startswith(f"a/1.{suffix}: it is damaged")


@pytest.mark.parametrize("most", [11, 5])
def test_pillows_limit_of_pixels_stays_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    put(tmp_path, "a/1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    assert refusal(tmp_path) == f"a/1.png: it has more than {most} pixels"


def test_more_images_than_fit_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/1.png")
    monkeypatch.setattr(columns, "_MEMORY", 11)
    assert "does not fit" in refusal(tmp_path)


def test_a_missing_pillow_is_told_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/1.png")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert "pip install 'wsfed[data]'" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_images_load_or_are_refused(
    tmp_path: Path, suffix: str, place: float, byte: int, cut: bool
) -> None:
    path = put(tmp_path, f"a/1.{suffix}", COLOUR)
    content = bytearray(path.read_bytes())
    index = int(place * len(content))
    content[index] = byte
    path.write_bytes(content[:index] if cut else content)
    with contextlib.suppress(DatasetError):
        folder_of(tmp_path)
