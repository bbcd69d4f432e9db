"""What is particular to runs on images, see `experiments.kinds.Kind`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from experiments.errors import ConfigError
from experiments.images.config import ImageConfig, ModelConfig
from experiments.images.data import Dataset, load
from experiments.images.deployment import deploy, samples
from experiments.images.models import read_layer_widths
from experiments.images.task import classification, make_network
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
    return data, make_task(config, data)


def make_task(config: ImageConfig, data: Dataset) -> Task:
    """See `Kind`."""
    return classification(config, data)


def smaller_model(
    config: ImageConfig, shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    """See `Kind`."""
    if config.model.module:
        raise ConfigError(
            f"{config.model.module} is a network of your own, and only its factory "
            f"knows the widths: shrink its arrays with cram_jax.structure"
        )
    return dataclasses.replace(config.model, layer_widths=read_layer_widths(shapes))


def network(
    config: ImageConfig, data: Dataset, params: Any, batch_stats: Any
) -> nnx.Module:
    """See `Kind`."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_network(config, data, 0)))
    return nnx.merge(graph, params, batch_stats)


def check_weights(config: ImageConfig) -> None:
    """There are none other than ``init_from``."""


def resolve(config: ImageConfig) -> ImageConfig:
    """The data add nothing."""
    return config


def check_teacher(config: ImageConfig, theirs: ImageConfig, run: Path) -> None:
    """See `Kind`; code named only in the teacher's configuration does not run."""
    if theirs.model.module not in ("", config.model.module):
        raise ConfigError(
            f"teacher {run} is of the network {theirs.model.module}, whose code is run "
            f"only for a student of the same"
        )


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
    """Only text models are exported this way."""
    del params, out, vocabulary
    raise ConfigError(f"{run} is a run on {config.kind}; export writes those on text")
