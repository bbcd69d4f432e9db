"""Images of your own: a folder with one folder for each class."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from experiments.errors import ConfigError, DataError, DatasetMissing

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
TRAIN, TEST = ("train",), ("test", "val", "validation", "eval")


class ImageFiles:
    """Random access to image files, as `LargeImages` reads them.

    Args:
      files: each with the number of its class.
      side: height and width that the middle of every image is scaled to; 0: unchanged.
    """

    def __init__(self, files: list[tuple[Path, int]], side: int = 0):
        self._files, self._side = files, side

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, label = self._files[index]
        try:
            with Image.open(file) as opened:
                picture = _colours(opened)
        except UNREADABLE as error:
            raise DataError(f"{file} cannot be read as an image: {error}") from error
        if self._side:
            short = min(picture.size)
            left, top = ((size - short) / 2 for size in picture.size)
            picture = picture.resize(
                (self._side, self._side),
                Image.Resampling.BILINEAR,
                (left, top, left + short, top + short),
            )
        return {"image": np.asarray(picture, np.uint8), "label": label}


def _colours(opened: Image.Image) -> Image.Image:
    """Three bytes a pixel, as viewers show it: upright, on white where transparent.

    Raises:
      ValueError: the range of the numbers is not known.
    """
    # Pillow would clip wider numbers at 255.
    if opened.mode.startswith("I;16"):
        opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
    elif opened.mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {opened.mode!r} have no known range; store 8 or 16 bits"
        )
    upright = ImageOps.exif_transpose(opened)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    coloured = upright.convert("RGBA")
    white = Image.new("RGBA", coloured.size, "white")
    return Image.alpha_composite(white, coloured).convert("RGB")


class Folder(NamedTuple):
    """The contents of a folder.

    Attributes:
      train: files to train on and their classes, in a random order that depends only
        on their names: those held out from its end stay held out if images are added.
      test: those to evaluate on; empty if there is no folder for them.
      classes: the names of the classes, sorted: class 0, class 1, ...
    """

    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    classes: tuple[str, ...]


def read_folder(place: str) -> Folder:
    """Lists the images of ``PLACE/train/CLASS/`` and ``PLACE/test/CLASS/``.

    Images may lie in folders of a class; what begins with a dot is left out. Without
    ``train``, the folders in PLACE itself are the classes, and images for evaluation
    have to be held out.

    Args:
      place: the folder.

    Raises:
      ConfigError: no folder is named.
      DatasetMissing: it does not exist.
      DataError: it has fewer than two classes, or the test images have another one.
    """
    if not place:
        raise ConfigError(
            "images of your own need --data.folder, a folder with one folder a class"
        )
    root = Path(place)
    if not root.is_dir():
        raise DatasetMissing(f"there is no folder {root}")
    train_root = next((root / n for n in TRAIN if (root / n).is_dir()), root)
    test_root = next((root / n for n in TEST if (root / n).is_dir()), None)
    classes = _classes(train_root)
    if train_root == root and (both := set(classes) & set(TEST)):
        raise DataError(
            f"{root} has a folder {min(both)!r} beside its classes; put the classes "
            f"into {root / TRAIN[0]}"
        )
    if len(classes) < 2:
        raise DataError(
            f"{train_root} must hold at least two folders, one a class, it holds "
            f"{', '.join(classes) or 'none'}"
        )
    train = _files(train_root, classes)
    empty = set(range(len(classes))) - {label for _, label in train}
    if empty:
        raise DataError(f"{train_root / classes[min(empty)]} holds no images")

    def shuffled(entry: tuple[Path, int]) -> bytes:
        name = entry[0].relative_to(train_root).as_posix()
        return hashlib.sha256(name.encode(errors="surrogateescape")).digest()

    test = []
    if test_root is not None and test_root != train_root and train_root != root:
        unknown = sorted(set(_classes(test_root)) - set(classes))
        if unknown:
            raise DataError(f"{test_root} has the class {unknown[0]!r}, training not")
        test = _files(test_root, classes)
    return Folder(sorted(train, key=shuffled), test, classes)


def divided(place: str, validation: int) -> Folder:
    """The images of a folder to train on, and to evaluate on.

    Args:
      place: see `read_folder`.
      validation: how many training images to evaluate on instead of the test images.

    Raises:
      ConfigError: no image is left for evaluation; see `read_folder` for others.
    """
    found = read_folder(place)
    if validation:
        left = max(len(found.train) - validation, 0)
        return found._replace(train=found.train[:left], test=found.train[left:])
    if not found.test:
        raise ConfigError(
            f"{place} has no folder test: hold images out with --data.validation "
            f"{len(found.train) // 5}"
        )
    return found


def _classes(root: Path) -> tuple[str, ...]:
    return tuple(
        sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    )


def _is_hidden(path: Path) -> bool:
    """Whether a part begins with a dot, as what macOS writes beside every file."""
    return any(part[0] == "." for part in path.parts)


def _files(root: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    known = tuple(Image.registered_extensions())
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in known and not _is_hidden(file.relative_to(root))
    ]
    if not files:
        raise DataError(f"{root} holds no images")
    return files
