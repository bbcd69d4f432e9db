"""Labelled images, in memory if they are small."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments.batches import Examples, Source
from experiments.datasets import (
    data_source,
    default_data_dir,
    examples,
    open_dataset,
)
from experiments.errors import ConfigError, DataError
from experiments.images import digits  # noqa: F401  registers the builder
from experiments.images.catalogue import CATALOGUE, DatasetInfo
from experiments.images.config import DataConfig
from experiments.images.folder import ImageFiles, divided
from experiments.images.large import MEAN, STD, LargeImages


class Dataset(NamedTuple):
    """A data set, in memory if its images are small.

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

    def normalize(self, images: Any) -> Any:
        """Images as the network expects them: mean 0, deviation 1, float32."""
        return (images.astype(np.float32) - self.mean) / self.std


def load(
    config: DataConfig, data_dir: Path | None = None, *, workers: int = 0
) -> Dataset:
    """Reads a data set, or opens it if its images are large.

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
    entry = CATALOGUE.get(config.name, DatasetInfo(config.name, size=(0, 0)))
    if config.classes and (config.name == "folder" or entry.size is None):
        raise ConfigError(
            f"classes must be empty for {config.name}, which is not read from "
            f"tensorflow-datasets into memory, got {config.classes}"
        )
    if config.name == "folder":
        return _own_images(config, workers)
    builder = open_dataset(entry.dataset, data_dir or default_data_dir())
    size = _size(builder, entry.train)
    classes = builder.info.features["label"].num_classes
    if entry.size is None:
        left = _left(config, size)
        source = data_source(builder, entry.train)
        train: Source = LargeImages(source, range(left), workers)
        evaluation: Source
        if config.validation:
            evaluation = LargeImages(source, range(left, size), workers)
        else:
            source = data_source(builder, entry.test)
            evaluation = LargeImages(source, range(len(source)), workers)
        return Dataset(train, evaluation, classes, MEAN, STD)
    chosen = config.classes or tuple(range(classes))
    if max(chosen) >= classes:
        raise ConfigError(
            f"classes must be below {classes} for {config.name}, got {config.classes}"
        )
    images = _of_classes(read(builder, entry.train), chosen)
    left = _left(config, images.size)
    if config.validation:
        judged = Examples(images.take(range(left, images.size)))
    else:
        judged = _of_classes(read(builder, entry.test), chosen)
    return _in_memory(Examples(images.take(range(left))), judged, len(chosen))


def _of_classes(images: Examples, classes: Sequence[int]) -> Examples:
    """The images of some classes, renumbered 0, 1, ... in the order given."""
    labels = images.arrays["label"]
    places = np.full(max(int(labels.max()), *classes) + 1, -1, labels.dtype)
    places[list(classes)] = np.arange(len(classes))
    numbers = places[labels]
    kept = np.flatnonzero(numbers >= 0)
    return Examples(images.take(kept) | {"label": numbers[kept]})


def _own_images(config: DataConfig, workers: int) -> Dataset:
    """The images of a folder."""
    folder = divided(config.folder, config.validation)
    if config.labels and folder.classes != config.labels:
        raise DataError(
            f"{config.folder} must have the classes {', '.join(config.labels)}, which "
            f"the run was trained for, got {', '.join(folder.classes)}"
        )
    held = len(folder.test) if config.validation else 0
    _left(config, len(folder.train) + held)
    sources = [ImageFiles(f, config.side) for f in (folder.train, folder.test)]
    if not config.side:
        large = [LargeImages(s, range(len(s)), workers) for s in sources]
        return Dataset(large[0], large[1], len(folder.classes), MEAN, STD)
    small = [_stacked([s[index] for index in range(len(s))]) for s in sources]
    return _in_memory(small[0], small[1], len(folder.classes))


def _in_memory(train: Examples, evaluation: Examples, classes: int) -> Dataset:
    pixels = train.arrays["image"].reshape(-1, train.arrays["image"].shape[-1])
    std = pixels.std(axis=0, dtype=np.float64).astype(np.float32)
    return Dataset(
        train=train,
        evaluation=evaluation,
        classes=classes,
        mean=pixels.mean(axis=0, dtype=np.float64).astype(np.float32),
        std=np.where(std > 0, std, np.float32(1)),  # a colour that never occurs
    )


def _left(config: DataConfig, size: int) -> int:
    left = size - config.validation
    if left < config.batch_size:
        raise ConfigError(
            f"validation={config.validation} leaves {left} of {size} training images, "
            f"fewer than batch_size={config.batch_size}"
        )
    return left


def _size(builder: tfds.core.DatasetBuilder, split: str) -> int:
    splits = builder.info.splits
    names = split.split("+")
    if missing := [name for name in names if name not in splits]:
        raise ConfigError(
            f"{builder.name} must have the split {missing[0]}, it has "
            f"{', '.join(splits)}"
        )
    return sum(splits[name].num_examples for name in names)


def read(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
    """Decodes the images of a split, ``image`` and ``label``."""
    return _stacked(examples(builder, split))


def _stacked(found: Sequence[Mapping[str, Any]]) -> Examples:
    return Examples(
        {
            "image": np.stack([example["image"] for example in found]),
            "label": np.array([example["label"] for example in found], np.int32),
        }
    )
