"""Folders of images: a sub-folder a class, in the order of their names.

An empty sub-folder is a class of which this worker has no image: labels of several workers mean the
same where all have the same sub-folders.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from wsfed.worker.columns import Columns, Pictures, Unfit

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["load_folder"]

_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
#: Pillow's readers that may be used; others of its hundred run programs or read other files.
_READERS: Final = ("PNG", "JPEG", "BMP", "GIF")
#: Pillow's modes of 8 bits a channel.
_GREY: Final = ("1", "L", "LA", "La")
_COLOUR: Final = ("RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


def load_folder(folder: Path) -> Columns:
    """``images``, read when they are needed, and ``labels``.

    Raises:
        Unfit: the folder has another form, or a file in it is no image.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise Unfit("Pillow is not installed: pip install 'wsfed[data]'") from None
    files, labels = _find(folder)
    seen = [_look(folder, file) for file in files]
    mode = "RGB" if any(colour for _, colour in seen) else "L"
    return {
        "images": Pictures(
            names=[_name(folder, file) for file in files],
            sizes=[size for size, _ in seen],
            channels=3 if mode == "RGB" else 1,
            read=lambda row: _read(folder, files[row], mode),
        ),
        "labels": torch.tensor(labels),
    }


def _find(folder: Path) -> tuple[Sequence[Path], Sequence[int]]:
    entries = _entries(folder)
    loose = next((entry for entry in entries if not entry.is_dir()), None)
    if loose is not None:
        raise Unfit(f"{loose.name}: images lie in sub-folders, one a class; move or remove it")
    files, labels = [], []
    for label, sub in enumerate(entries):
        for file in _entries(sub):
            if file.is_dir():
                raise Unfit(f"{_name(folder, file)}: this is a folder inside a class; move it")
            if file.suffix.lower() not in _SUFFIXES:
                known = " ".join(_SUFFIXES)
                raise Unfit(f"{_name(folder, file)}: no image ({known}); convert or remove it")
            files.append(file)
            labels.append(label)
    if not files:
        raise Unfit("there is no image in it; put images in sub-folders, one a class")
    return files, labels


def _entries(folder: Path) -> list[Path]:
    """By name, without hidden ones, which file managers leave everywhere."""
    visible = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(visible, key=lambda entry: entry.name)


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _look(folder: Path, file: Path) -> tuple[tuple[int, int], bool]:
    """Height and width, and whether it has colour, without decoding it."""
    with _opened(folder, file) as image:
        if image.mode in ("P", "PA"):
            palette = np.array(image.getpalette() or [0, 0, 0]).reshape(-1, 3)
            colour = bool((palette != palette[:, :1]).any())
        elif image.mode in (*_GREY, *_COLOUR):
            colour = image.mode in _COLOUR
        else:
            raise Unfit(
                f"{_name(folder, file)}: its pixels ({image.mode}) have more than 8 bits; convert "
                "it, or keep such images in .npz"
            )
        return (image.height, image.width), colour


def _read(folder: Path, file: Path, mode: str) -> torch.Tensor:
    with _opened(folder, file) as image:
        pixels = np.array(image.convert(mode))
    return torch.from_numpy(pixels if mode == "L" else pixels.transpose(2, 0, 1)).reshape(
        1 if mode == "L" else 3, *pixels.shape[:2]
    )


@contextmanager
def _opened(folder: Path, file: Path) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as odd metadata
            # Pillow only warns of an image that takes up to twice of what it allows.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_READERS) as image:
                yield image
    except (Unfit, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = Image.MAX_IMAGE_PIXELS or 0
        raise Unfit(f"{_name(folder, file)}: it has more than {most:,} pixels") from None
    except UnidentifiedImageError:
        known = ", ".join(_READERS)
        raise Unfit(f"{_name(folder, file)}: it is damaged, or none of {known}") from None
    except Exception as error:  # what Pillow raises for damaged bytes has no end
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise Unfit(f"{_name(folder, file)}: it is damaged or cannot be read ({reason})") from None
