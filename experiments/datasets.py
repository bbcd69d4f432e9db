"""Data sets as tensorflow-datasets keeps them, read without TensorFlow."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from experiments.errors import ConfigError, DataError, DatasetMissing, first_line
from experiments.images import digits  # noqa: F401  registers the builder
from experiments.images.catalogue import CATALOGUE


def default_data_dir() -> Path:
    """The user's cache: ``$XDG_CACHE_HOME/cram_jax``, by default under ``~/.cache``."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cram_jax"
    )


def data_dir_note(data_dir: Path | None) -> dict[str, str]:
    """What the status of a run says of where its data are."""
    return {"data_dir": str((data_dir or default_data_dir()).absolute())}


def open_dataset(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Finds a data set; the digits are prepared if they are missing.

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
    except Exception as error:  # whatever damaged files cause
        raise DataError(
            f"{name} in {where} cannot be opened: {first_line(error)}; prepare it again"
        ) from error
    if name == "digits":
        tfds.disable_progress_bar()
        try:
            # It would announce a download that does not happen.
            with contextlib.redirect_stdout(None):
                builder.download_and_prepare()
        except FileExistsError:  # another process was faster
            builder = tfds.builder(name, data_dir=where)
    elif not builder.data_path.exists():
        raise not_prepared(name, data_dir)
    return builder


def not_prepared(name: str, data_dir: Path) -> DatasetMissing:
    """The error if a data set exists, but not in this directory."""
    where = data_dir.expanduser()
    return DatasetMissing(
        f"{name} is not in {where}. Prepare it once with\n"
        f"  tfds build {name} --data_dir {where} --file_format array_record\n"
        f"(this downloads it, and needs TensorFlow for some sets), or name the "
        f"directory that holds it with --data-dir."
    )


def data_source(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    """Opens a split, such as ``train[:1000]``, for random access.

    Raises:
      ConfigError: there is no such split.
      DataError: its files are missing, or do not hold what their index says.
    """
    name = re.split(r"[\[+]", split)[0]
    if name not in builder.info.splits:
        raise ConfigError(
            f"split must be one of {', '.join(builder.info.splits)}, or a part such as "
            f"train[:1000], got {split!r}"
        )
    for part in split.split("+"):
        _check_records(builder, part.split("[")[0])
    try:
        return builder.as_data_source(split=split)
    except ValueError as error:
        raise ConfigError(f"split must be a part of {name}, got {split!r}") from error


def _check_records(builder: tfds.core.DatasetBuilder, split: str) -> None:
    """Compares the index of a split with its files: tensorflow-datasets trusts it."""
    if split not in builder.info.splits:
        return
    info = builder.info.splits[split]
    try:
        readers = [ArrayRecordReader(str(path)) for path in info.filepaths]
        found = sum(reader.num_records() for reader in readers)
    except Exception as error:  # of the system or of array_record
        raise DataError(
            f"{builder.data_path} is damaged: {split}: {first_line(error)}; prepare it "
            f"again"
        ) from error
    if found != info.num_examples:
        raise DataError(
            f"{builder.data_path} is damaged: {split} holds {found} examples, its "
            f"index says {info.num_examples}; prepare it again"
        )


def examples(builder: tfds.core.DatasetBuilder, split: str) -> list[dict[str, Any]]:
    """Decodes a split, such as ``train[:1000]``.

    Raises:
      ConfigError: there is no such split.
      DataError: its files are damaged.
    """
    source = data_source(builder, split)
    try:
        found: list[dict[str, Any]] = source.__getitems__(range(len(source)))
    except Exception as error:  # of array_record or of the decoders
        raise DataError(
            f"{builder.data_path} is damaged: {split}: {first_line(error)}"
        ) from error
    return found
