"""What is particular to runs on images, see `experiments.kinds.Kind`."""

from pathlib import Path
from typing import Any

from experiments.errors import ConfigError
from experiments.images.config import ImageConfig
from experiments.images.data import Dataset, load
from experiments.images.deployment import deploy, samples
from experiments.images.task import classification
from experiments.images.torchvision import load_torchvision
from experiments.task import Model, Task

__all__ = ["deploy", "samples"]

SOURCES = "a run's directory or a file of torchvision's weights"
WEIGHT_FILES: tuple[str, ...] = (".safetensors", ".pth", ".pt")


def prepare(
    config: ImageConfig, data_dir: Path | None = None, *, workers: int = 0
) -> tuple[Dataset, Task]:
    """See `Kind`."""
    data = load(config.data, data_dir, workers=workers)
    return data, classification(config, data)


def check_weights(config: ImageConfig) -> None:
    """There are none beside ``init_from``."""


def resolve(config: ImageConfig) -> ImageConfig:
    """There is nothing that the data has to say."""
    return config


def load_weights(config: ImageConfig, file: Path, classes: int | None) -> Model:
    """See `Kind`; of torchvision's ResNets."""
    return load_torchvision(file, config.model.name, classes=classes)


def keep_sources(config: ImageConfig, run: Path) -> None:
    """There are none."""
    del config, run


def kept_sources(config: ImageConfig, run: Path) -> ImageConfig:
    """There are none."""
    del run
    return config


def export(
    config: ImageConfig, params: Any, run: Path, out: Path, vocabulary: Path | None
) -> None:
    """Only models of text are exported so."""
    del params, out, vocabulary
    raise ConfigError(f"{run} is a run on {config.kind}; export writes those on text")
