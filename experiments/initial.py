"""Where a run starts from: another run's model, or torchvision's weights."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import checkpoints
from experiments.config import Config
from experiments.errors import ConfigError, WeightsError
from experiments.models.torchvision_weights import load_torchvision
from experiments.tasks.classification import Task

FILES = (".safetensors", ".pth", ".pt")


def check_source(config: Config) -> None:
    """Raises where ``init_from`` cannot be what a run starts from.

    Raises:
      ConfigError: it has to be named, or is neither a directory nor a file of weights.
    """
    source = config.init_from
    if source is None:
        return
    if not source:
        raise ConfigError(
            f"{config.name} starts from trained weights: name a run's directory or a "
            f"file of torchvision's weights with --init-from"
        )
    if not Path(source).is_dir() and Path(source).suffix not in FILES:
        raise ConfigError(
            f"init_from must be a run's directory or a file ending in "
            f"{', '.join(FILES)}, got {source!r}"
        )


def initial_model(config: Config, task: Task) -> tuple[Any, Any] | None:
    """Reads the parameters and batch statistics that a run starts from.

    Args:
      config: ``init_from`` says from where, ``new_head`` whether the classification
        layer is drawn anew, with the initial weights of the seed.
      task: for the shapes.

    Returns:
      params and batch_stats like those of ``task.init``; None where that is to draw
      them.

    Raises:
      ConfigError: see `check_source`.
      RunError: the directory holds no model.
      WeightsError: the model is another one.
    """
    check_source(config)
    if config.init_from is None:
        return None
    source = Path(config.init_from)
    ours = task.init(config.seed)
    if source.is_dir():
        params, batch_stats = checkpoints.read_model(source)
    else:
        classes = ours[0]["head"]["bias"].shape[0] if config.new_head else None
        name = config.model.name
        params, batch_stats = load_torchvision(source, name, classes=classes)
    if config.new_head:
        params = params | {"head": ours[0]["head"]}
    _check_shapes((params, batch_stats), ours, config)
    return jax.tree.map(jnp.asarray, (params, batch_stats))


def _check_shapes(theirs: Any, ours: Any, config: Config) -> None:
    there, here = _shapes(theirs), _shapes(ours)
    wrong = [path for path in here if here[path] != there.get(path)]
    wrong += [path for path in there if path not in here]
    if not wrong:
        return
    path = wrong[0]
    advice = ""
    if all(other.startswith("head/") for other in wrong):
        advice = "; --new-head True draws a new classification layer"
    raise WeightsError(
        f"{config.init_from} does not fit {config.model.name} here: {path} is "
        f"{there.get(path, 'missing')} there and {here.get(path, 'missing')} here, and "
        f"{len(wrong) - 1} more differ{advice}"
    )


def _shapes(model: tuple[Any, Any]) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for tree in model
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
