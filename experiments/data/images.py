"""Labelled images, in memory where they are small."""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments.config import DataConfig
from experiments.data import digits  # noqa: F401  registers the builder
from experiments.data.batches import Examples, Source
from experiments.data.catalogue import CATALOGUE, Entry
from experiments.data.large import MEAN, STD, LargeImages
from experiments.errors import ConfigError, DatasetMissing


class Dataset(NamedTuple):
    """A data set, in memory where its images are small.

    Attributes:
      train: ``image`` (uint8, height, width, channels) and ``label`` to train on.
      evaluation: the test images, or those held out of the training images.
      classes: number of classes.
      mean: float32, (channels,), of the training images.
      std: float32, (channels,), of the training images.
    """

    train: Source
    evaluation: Source
    classes: int
    mean: np.ndarray
    std: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return self.train.take([0])["image"].shape[1:]


def default_data_dir() -> Path:
    """The user's cache: ``$XDG_CACHE_HOME/cram_jax``, by default under ``~/.cache``."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cram_jax"
    )


def load(
    config: DataConfig, data_dir: Path | None = None, *, workers: int = 0
) -> Dataset:
    """Reads a data set, or opens it where its images are large.

    The digits are prepared at first use.

    Args:
      config: which data set, and how many of its training images to hold out.
      data_dir: where tensorflow-datasets keeps it; by default the user's cache.
      workers: processes that decode large images; 0: threads.

    Returns:
      The images.

    Raises:
      DatasetMissing: it is not there and cannot be made from nothing.
      ConfigError: the configuration asks for more images than there are.
    """
    entry = CATALOGUE.get(config.name, Entry(config.name, size=()))
    builder = open_dataset(entry.dataset, data_dir or default_data_dir())
    size = _size(builder, entry.train)
    left = size - config.validation
    if left < config.batch_size:
        raise ConfigError(
            f"validation={config.validation} leaves {left} of {size} training images, "
            f"fewer than batch_size={config.batch_size}"
        )
    classes = builder.info.features["label"].num_classes
    if entry.size is None:
        source = builder.as_data_source(split=entry.train)
        train = LargeImages(source, range(left), workers)
        if config.validation:
            evaluation = LargeImages(source, range(left, size), workers)
        else:
            source = builder.as_data_source(split=entry.test)
            evaluation = LargeImages(source, range(len(source)), workers)
        return Dataset(train, evaluation, classes, MEAN, STD)
    images = read(builder, entry.train)
    train = images.take(range(left))
    held = images.take(range(left, size))
    pixels = train["image"].reshape(-1, train["image"].shape[-1])
    return Dataset(
        train=Examples(train),
        evaluation=Examples(held) if config.validation else read(builder, entry.test),
        classes=classes,
        mean=pixels.mean(axis=0, dtype=np.float64).astype(np.float32),
        std=pixels.std(axis=0, dtype=np.float64).astype(np.float32),
    )


def _size(builder: tfds.core.DatasetBuilder, split: str) -> int:
    splits = builder.info.splits
    names = split.split("+")
    if missing := [name for name in names if name not in splits]:
        raise ConfigError(
            f"{builder.name} must have the split {missing[0]}, it has "
            f"{', '.join(splits)}"
        )
    return sum(splits[name].num_examples for name in names)


def open_dataset(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Finds a data set; the digits are prepared where they are not.

    Raises:
      DatasetMissing: it is not there and cannot be made from nothing.
    """
    where = str(data_dir.expanduser())
    try:
        builder = tfds.builder(name, data_dir=where, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        if any(e.dataset == name for e in CATALOGUE.values()):
            raise DatasetMissing(
                f"{name} is not in {where}, and tensorflow-datasets has no builder for "
                f"it: store it there in its form, with image and label"
            ) from error
        raise DatasetMissing(f"no data set is called {name!r}") from error
    if name == "digits":
        tfds.disable_progress_bar()
        try:
            # It would announce a download, but there is none.
            with contextlib.redirect_stdout(None):
                builder.download_and_prepare()
        except FileExistsError:  # another process was faster
            builder = tfds.builder(name, data_dir=where)
    elif not builder.data_path.exists():
        raise not_prepared(name, data_dir)
    return builder


def not_prepared(name: str, data_dir: Path) -> DatasetMissing:
    """The error where a data set exists, but not in this directory."""
    where = data_dir.expanduser()
    return DatasetMissing(
        f"{name} is not in {where}. Prepare it once with\n"
        f"  tfds build {name} --data_dir {where} --file_format array_record\n"
        f"(this downloads it, and needs TensorFlow for some sets), or name the "
        f"directory that holds it with --data-dir."
    )


def examples(builder: tfds.core.DatasetBuilder, split: str) -> list[dict[str, Any]]:
    """Decodes a split, such as ``train[:1000]``.

    Raises:
      ConfigError: there is no such split.
    """
    try:
        source = builder.as_data_source(split=split)
    except ValueError as error:
        raise ConfigError(
            f"split must be one of {', '.join(builder.info.splits)}, or a part such as "
            f"train[:1000], got {split!r}"
        ) from error
    return source.__getitems__(range(len(source)))


def read(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
    """Decodes the images of a split, ``image`` and ``label``."""
    found = examples(builder, split)
    return Examples(
        {
            "image": np.stack([example["image"] for example in found]),
            "label": np.array([example["label"] for example in found], np.int32),
        }
    )
