"""Labelled images in memory, and the order in which a run sees them."""

import contextlib
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments.config import DataConfig
from experiments.data import digits  # noqa: F401  registers the builder
from experiments.errors import ConfigError, DatasetMissing

Batch = dict[str, Any]  # arrays of numpy, or of jax over a mesh


class Images(NamedTuple):
    """Some images.

    Attributes:
      images: uint8, (count, height, width, channels).
      labels: int32, (count,).
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set in memory.

    Attributes:
      train: the images to train on.
      evaluation: the test images, or those held out of the training images.
      classes: number of classes.
      mean: float32, (channels,), of the training images.
      std: float32, (channels,), of the training images.
    """

    train: Images
    evaluation: Images
    classes: int
    mean: np.ndarray
    std: np.ndarray


def default_data_dir() -> Path:
    """The user's cache: ``$XDG_CACHE_HOME/cram_jax``, by default under ``~/.cache``."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cram_jax"
    )


def load(config: DataConfig, data_dir: Path | None = None) -> Dataset:
    """Reads a data set; the digits are prepared at first use.

    Args:
      config: which data set, and how many of its training images to hold out.
      data_dir: where tensorflow-datasets keeps it; by default the user's cache.

    Returns:
      The images, decoded.

    Raises:
      DatasetMissing: it is not there and cannot be made from nothing.
      ConfigError: the configuration asks for more images than there are.
    """
    builder = open_dataset(config.name, data_dir or default_data_dir())
    size = builder.info.splits["train"].num_examples
    left = size - config.validation
    if left < config.batch_size:
        raise ConfigError(
            f"validation={config.validation} leaves {left} of {size} training images, "
            f"fewer than batch_size={config.batch_size}"
        )
    train = read(builder, f"train[:{left}]")
    split = f"train[{left}:]" if config.validation else "test"
    pixels = train.images.reshape(-1, train.images.shape[-1])
    return Dataset(
        train=train,
        evaluation=read(builder, split),
        classes=builder.info.features["label"].num_classes,
        mean=pixels.mean(axis=0, dtype=np.float64).astype(np.float32),
        std=pixels.std(axis=0, dtype=np.float64).astype(np.float32),
    )


def training_batches(
    data: Images,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    rows: Callable[[np.ndarray, np.ndarray], Any] = operator.getitem,
) -> Iterator[Batch]:
    """The batches of the steps from ``start`` up to ``stop``.

    Every epoch has its own order, a function of the seed and its number alone, so a
    run that is resumed at ``start`` sees what an uninterrupted one sees. The last
    partial batch of an epoch is left out.

    Args:
      data: the images.
      batch_size: images in a batch.
      seed: of the run.
      start: first step, counted from 0.
      stop: the step after the last.
      rows: ``(array, chosen) -> rows of it``; with a mesh, those of this process.

    Yields:
      ``image`` and ``label``, with a leading axis of ``batch_size``.
    """
    steps = len(data.labels) // batch_size
    for step in range(start, stop):
        epoch, position = divmod(step, steps)
        if position == 0 or step == start:
            order = np.random.default_rng((seed, epoch)).permutation(len(data.labels))
        chosen = order[position * batch_size : (position + 1) * batch_size]
        yield {"image": rows(data.images, chosen), "label": rows(data.labels, chosen)}


def evaluation_batches(data: Images, batch_size: int) -> Iterator[Batch]:
    """Every image once, in order; the last batch is filled up with weight 0.

    Yields:
      ``image``, ``label`` and ``weight`` (float32; 1 for an image, 0 for filling), with
      a leading axis of ``batch_size``, so that one compilation serves all.
    """
    for begin in range(0, len(data.labels), batch_size):
        images = data.images[begin : begin + batch_size]
        labels = data.labels[begin : begin + batch_size]
        fill = batch_size - len(labels)
        yield {
            "image": np.pad(images, ((0, fill), (0, 0), (0, 0), (0, 0))),
            "label": np.pad(labels, (0, fill)),
            "weight": np.pad(np.ones(len(labels), np.float32), (0, fill)),
        }


def open_dataset(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Finds a data set; the digits are prepared where they are not.

    Raises:
      DatasetMissing: it is not there and cannot be made from nothing.
    """
    where = str(data_dir.expanduser())
    try:
        builder = tfds.builder(name, data_dir=where, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
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
        raise DatasetMissing(
            f"{name} is not in {where}. Prepare it once with\n"
            f"  tfds build {name} --data_dir {where} --file_format array_record\n"
            f"(this downloads it, and needs TensorFlow for some sets), or name the "
            f"directory that holds it with --data-dir."
        )
    return builder


def read(builder: tfds.core.DatasetBuilder, split: str) -> Images:
    """Decodes the images of a split, such as ``train[:1000]``."""
    source = builder.as_data_source(split=split)
    examples = source.__getitems__(range(len(source)))
    return Images(
        np.stack([example["image"] for example in examples]),
        np.array([example["label"] for example in examples], np.int32),
    )
