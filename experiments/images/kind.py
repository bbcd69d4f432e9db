"""What is particular to runs on images, see `experiments.kinds.Kind`."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

from cram_jax.paths import named_leaves
from cram_jax.structure import Structure, group_masks
from experiments.compression.channels import parameter_shapes
from experiments.errors import ConfigError, cannot_write
from experiments.images.config import ImageConfig, ModelConfig
from experiments.images.data import Dataset, load
from experiments.images.deployment import deploy, samples
from experiments.images.folder import read_folder
from experiments.images.models import IMAGENET_RESNETS, read_layer_widths
from experiments.images.own import widths_left
from experiments.images.task import classification, make_network
from experiments.images.torchvision import load_torchvision, save_torchvision
from experiments.task import Model, Task

__all__ = ["deploy", "samples"]

SOURCES = "a run's directory or a file of torchvision's weights"
WEIGHT_FILES: tuple[str, ...] = (".safetensors", ".pth", ".pt")
LIBRARY = "torchvision"


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
    config: ImageConfig, data: Dataset, structure: Structure, kept: Any
) -> ModelConfig:
    """See `Kind`."""
    if config.model.module:
        masks = named_leaves(group_masks(structure, kept))
        dense = nnx.eval_shape(lambda: make_network(config, data, 0))
        by_path = {path.partition("/")[2]: mask for path, mask in masks}
        widths = widths_left(dense, data.shape, by_path)
    else:
        widths = read_layer_widths(parameter_shapes(structure, kept))
    return dataclasses.replace(config.model, layer_widths=widths)


def network(
    config: ImageConfig, data: Dataset, params: Any, batch_stats: Any
) -> nnx.Module:
    """See `Kind`."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_network(config, data, 0)))
    return nnx.merge(graph, params, batch_stats)


def check_weights(config: ImageConfig) -> None:
    """There are none other than ``init_from``."""


def resolve(config: ImageConfig) -> ImageConfig:
    """Adds the names of the classes of a folder."""
    data = config.data
    if data.name != "folder" or data.labels:
        return config
    labels = read_folder(data.folder).classes
    return dataclasses.replace(config, data=dataclasses.replace(data, labels=labels))


def check_teacher(config: ImageConfig, theirs: ImageConfig, run: Path) -> None:
    """See `Kind`; code named only in the teacher's configuration does not run."""
    if theirs.model.module not in ("", config.model.module):
        raise ConfigError(
            f"teacher {run} is of the network {theirs.model.module}, whose code is run "
            f"only for a student of the same"
        )
    tasks = [
        (c.data.name, c.data.classes, c.data.labels or config.data.labels)
        for c in (config, theirs)
    ]
    if tasks[0] != tasks[1]:
        raise ConfigError(f"teacher must be for {tasks[0]}, {run} is for {tasks[1]}")


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
    config: ImageConfig, model: Model, run: Path, out: Path, vocabulary: Path | None
) -> None:
    """Writes a file of tensors that torchvision's network of the name takes."""
    del run, vocabulary
    named = ModelConfig(name=config.model.name, dtype=config.model.dtype)
    if config.model != named or named.name not in IMAGENET_RESNETS:
        names = ", ".join(IMAGENET_RESNETS)
        raise ConfigError(
            f"torchvision has {names} with all their channels, not {config.model.title}"
        )
    try:
        save_torchvision(out, *model)
    except OSError as error:
        raise cannot_write(out, error) from error
