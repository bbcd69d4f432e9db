"""Save, restore, resume: a run directory's checkpoints, by orbax."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.errors import RunError
from experiments.images.config import Config
from experiments.run_directory import cannot_write, reading, write_text
from experiments.sharding import on_first_process
from experiments.stored_config import from_dict, to_dict

# What Orbax logs as an error it also raises, and we say it in our words.
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def save_config(run: Path, config: Config) -> None:
    """Writes ``config.json``.

    Raises:
      RunError: it cannot be written.
    """
    write_text(run / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def load_config(run: Path) -> Config:
    """Reads ``config.json``.

    Raises:
      RunError: there is none, or it is damaged.
    """
    path = run / "config.json"
    if not path.exists():
        raise RunError(f"{run} is not a run: it has no config.json")
    try:
        return from_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise RunError(f"cannot read {path}: {error}") from error


def manager(run: Path) -> ocp.CheckpointManager:
    """The training checkpoints of a run, named by their step; the last two are kept.

    Raises:
      RunError: the directory cannot be made.
    """
    directory = (run / "checkpoints").absolute()
    try:
        return ocp.CheckpointManager(
            directory,
            # Not in the background: the next step may reuse the memory of the state.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False
            ),
        )
    except OSError as error:
        raise cannot_write(directory, error) from error


def save(checkpoints: ocp.CheckpointManager, state: Any) -> None:
    """Saves a training state under its step.

    The state is all that a run needs to go on: the position in the data follows from
    the step and the seed of the configuration. A checkpoint gets its name when it is
    complete: one that was interrupted does not count, and earlier ones are untouched.

    Raises:
      RunError: it cannot be written.
    """
    step = int(state.step)
    try:
        checkpoints.save(step, args=ocp.args.StandardSave(state))
    except Exception as error:  # of the system, of tensorstore or of orbax
        raise cannot_write(Path(checkpoints.directory) / str(step), error) from error


def restore(checkpoints: ocp.CheckpointManager, like: Any) -> Any:
    """Restores the last training state; its structure is that of ``like``.

    Raises:
      RunError: there is no checkpoint, or the last one is damaged.
    """
    step = checkpoints.latest_step()
    if step is None:
        raise RunError(f"{checkpoints.directory} holds no checkpoint")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    earlier = [other for other in checkpoints.all_steps() if other < step]
    advice = f"; remove it to go on from step {max(earlier)}" if earlier else ""
    with reading(Path(checkpoints.directory) / str(step), advice):
        return checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))


def save_model(run: Path, config: Config, params: Any, batch_stats: Any) -> None:
    """Saves a model without its training state, in a run directory of its own.

    Raises:
      RunError: it cannot be written.
    """
    on_first_process(lambda: save_config(run, config))
    model = {"params": params, "batch_stats": batch_stats}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((run / "model").absolute(), model, force=True)
    except Exception as error:  # of the system, of tensorstore or of orbax
        raise cannot_write(run / "model", error) from error


def load_model(run: Path, like: Any) -> tuple[Any, Any]:
    """Reads the model of a run: what `save_model` wrote, or the last checkpoint.

    Args:
      run: the run's directory.
      like: the training state of such a run, arrays or their shapes.

    Returns:
      The parameters and the batch statistics.

    Raises:
      RunError: there is neither, or what there is is damaged.
    """
    if (run / "model").exists():
        abstract = {"params": like.params, "batch_stats": like.batch_stats}
        with reading(run / "model"), ocp.StandardCheckpointer() as checkpointer:
            model = checkpointer.restore((run / "model").absolute(), abstract)
        return model["params"], model["batch_stats"]
    if not (run / "checkpoints").exists():
        raise RunError(f"{run} holds no checkpoint; train it with --resume")
    with manager(run) as checkpoints:
        state = restore(checkpoints, like)
    return state.params, state.batch_stats


def read_model(run: Path) -> tuple[Any, Any]:
    """Reads the model of a run whose shapes nobody knows beforehand.

    Args:
      run: the run's directory.

    Returns:
      The parameters and the batch statistics, as trees of NumPy arrays.

    Raises:
      RunError: it holds none, or a damaged one.
    """
    load_config(run)  # says what is wrong with a directory that is no run
    directory = run / "model"
    if not directory.exists():
        step = latest_step(run)
        if step is None:
            raise RunError(f"{run} holds no checkpoint; train it with --resume")
        directory = run / "checkpoints" / str(step) / "default"
    handler = ocp.PyTreeCheckpointHandler()
    with reading(directory), ocp.Checkpointer(handler) as checkpointer:
        stored = checkpointer.metadata(directory.absolute()).item_metadata.tree
        abstract = {
            name: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored[name]
            )
            for name in ("params", "batch_stats")
        }
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        model = checkpointer.restore(
            directory.absolute(),
            ocp.args.PyTreeRestore(
                abstract,
                restore_args=jax.tree.map(lambda _: as_numpy, abstract),
                partial_restore=True,
            ),
        )
    return model["params"], model["batch_stats"]


def latest_step(run: Path) -> int | None:
    """The step of the last checkpoint, None where there is none."""
    names = (path.name for path in (run / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=None)
