"""A trained run, opened for use: its configuration, data, task and model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.images.config import ImageConfig
from experiments.kinds import kind_of, prepare
from experiments.runs import checkpoints
from experiments.runs.directory import load_config, read_status, state_of
from experiments.task import Task
from experiments.training.step import TrainState


class OpenRun(NamedTuple):
    """A run with everything that its model is used with.

    Attributes:
      config: the run's, with its own copies of files instead of the originals.
      data: its examples.
      task: its loss, evaluation and network.
      params: the trained parameters.
      batch_stats: their batch statistics; empty if there are none.
    """

    config: RunConfig
    data: Any
    task: Task
    params: Any
    batch_stats: Any


def open_run(run: Path, data_dir: Path | None, say: Callable[[str], Any]) -> OpenRun:
    """Reads a run or a compressed model.

    Args:
      run: its directory.
      data_dir: where tensorflow-datasets keeps its data; None: where the run found it.
      say: told what is noteworthy, such as that the run is not finished.

    Raises:
      RunError: the run cannot be read.
      ConfigError: its data cannot be read.
    """
    config = load_config(run)
    if note := state_of(run):
        say(f"note: {note}")
    if "diverged" in note:
        say("note: these results are of its last checkpoint before that")
    config = kind_of(config).kept_sources(config, run)
    data, task = prepare(config, data_dir or stored_data_dir(run))
    # Without the optimiser, whose targets may not suit a network that was made smaller.
    like = jax.eval_shape(
        lambda seed: TrainState(seed, *task.init(seed), (), seed), config.seed
    )
    return OpenRun(config, data, task, *checkpoints.load_model(run, like, say))


def load_network(
    run: Path | str, *, data_dir: Path | None = None, module: str = ""
) -> tuple[nnx.Module, Any]:
    """Reads the trained network of a run, to use it in a program of your own.

    Args:
      run: the directory of a run, or of a compressed model.
      data_dir: where tensorflow-datasets keeps its data; by default where the run found
        it.
      module: the run's ``model.module`` if its network is your own, to allow its
        import.

    Returns:
      The network, an NNX module with the trained weights, and its data, see
      `experiments.kinds.Kind.prepare`. Networks on images expect normalised ones:
      ``network(data.normalize(images), training=False)``.

    Raises:
      RunError: the run cannot be read.
      ConfigError: its data cannot be read, or ``module`` does not name its network.
    """
    run = Path(run)
    config = load_config(run)
    named = config.model.module if isinstance(config, ImageConfig) else ""
    if named and module != named:
        raise ConfigError(
            f"module must be {named!r}, got {module!r}: the code of the network of "
            f"{run} is run only if you name it"
        )
    config, data, _, params, batch_stats = open_run(run, data_dir, print)
    return kind_of(config).network(config, data, params, batch_stats), data


def stored_data_dir(run: Path) -> Path | None:
    """Where a run, or the run it was made from, found its data."""
    stored = read_status(run).get("data_dir")
    return Path(stored) if isinstance(stored, str) and stored else None
