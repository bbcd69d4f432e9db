"""Labelled images, in memory where they are small."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments.batches import Examples, Source
from experiments.datasets import default_data_dir, examples, open_dataset
from experiments.errors import ConfigError
from experiments.images import digits  # noqa: F401  registers the builder
from experiments.images.catalogue import CATALOGUE, DatasetInfo
from experiments.images.config import DataConfig
from experiments.images.large import MEAN, STD, LargeImages


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
    entry = CATALOGUE.get(config.name, DatasetInfo(config.name, size=()))
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


def read(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
    """Decodes the images of a split, ``image`` and ``label``."""
    found = examples(builder, split)
    return Examples(
        {
            "image": np.stack([example["image"] for example in found]),
            "label": np.array([example["label"] for example in found], np.int32),
        }
    )
