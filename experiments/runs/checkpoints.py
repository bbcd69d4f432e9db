"""Save, restore, resume: a run's checkpoints, by orbax, each with its checksums."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cram_jax.paths import named_leaves
from cram_jax.projector import leaf_path
from cram_jax.writing import replace
from experiments.config import RunConfig
from experiments.errors import (
    NonFiniteLoss,
    RunError,
    cannot_write,
)
from experiments.runs.checksums import abstract_checksums, checksums
from experiments.runs.directory import (
    load_config,
    reading,
    resume_command,
    save_config,
)
from experiments.sharding import is_first_process, on_first_process

# Orbax also raises the errors that it logs, and we report those in our own words.
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)

MODEL = ("params", "batch_stats", "ema")


def manager(run: Path, keep: int = 2) -> ocp.CheckpointManager:
    """The training checkpoints of a run, named by their step; the last are kept.

    Raises:
      RunError: the directory cannot be made.
    """
    directory = (run / "checkpoints").absolute()
    try:
        return ocp.CheckpointManager(
            directory,
            # Not in the background: the next step may reuse the memory of the state.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
        )
    except OSError as error:
        raise cannot_write(directory, error) from error


def save(checkpoints: ocp.CheckpointManager, state: Any) -> None:
    """Saves a training state under its step.

    The state is all that a run needs to resume: the position in the data follows from
    the step and the seed of the configuration. A checkpoint gets its name when it is
    complete: interrupted ones do not count, and earlier ones are untouched.

    Raises:
      NonFiniteLoss: the weights are not finite; nothing is written.
      RunError: it cannot be written.
    """
    step = int(state.step)
    check_finite((state.params, state.batch_stats), f"at step {step}")
    stored = state._asdict()
    stored["checksums"] = _each(stored, checksums)
    try:
        for later in [s for s in checkpoints.all_steps() if s >= step]:
            checkpoints.delete(later)  # damaged ones, which were skipped
        if not checkpoints.save(step, args=ocp.args.StandardSave(stored)):
            raise OSError("orbax did not save it")
    except Exception as error:  # of the system, of tensorstore or of orbax
        raise cannot_write(Path(checkpoints.directory) / str(step), error) from error


def restore(
    checkpoints: ocp.CheckpointManager,
    like: Any,
    say: Callable[[str], None] = lambda message: None,
) -> Any:
    """Restores the last intact training state.

    Args:
      checkpoints: of the run.
      like: a state with the same structure, arrays or their shapes.
      say: told of every damaged checkpoint that was skipped.

    Returns:
      The state.

    Raises:
      RunError: there is no checkpoint, all of them are damaged, or they do not match
        ``like``.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
    abstract["checksums"] = _each(abstract, abstract_checksums)
    steps = sorted(checkpoints.all_steps(), reverse=True)
    if not steps:
        raise RunError(f"{checkpoints.directory} holds no checkpoint")
    problems = []
    for step in steps:
        place = Path(checkpoints.directory) / str(step)
        try:
            _check_fits(place / "default", abstract, place.parents[1])
            with reading(place):
                stored = checkpoints.restore(
                    step, args=ocp.args.StandardRestore(abstract)
                )
            _check_whole(stored, place)
        except _OtherModel:
            raise
        except RunError as error:
            problems.append(str(error))
            earlier = [other for other in steps if other < step]
            if earlier:
                say(f"{error}; resuming from the previous checkpoint, {max(earlier)}")
            continue
        del stored["checksums"]
        return type(like)(**stored)
    raise RunError(f"{problems[0]}; no earlier checkpoint is whole")


def save_model(run: Path, config: RunConfig, params: Any, batch_stats: Any) -> None:
    """Saves a model without its training state, in a run directory of its own.

    An earlier one there is removed when the new one is complete.

    Raises:
      NonFiniteLoss: its weights are not finite; nothing is written.
      RunError: it cannot be written.
    """
    check_finite((params, batch_stats), f"in {run}")
    on_first_process(lambda: save_config(run, config))
    model = {"params": params, "batch_stats": batch_stats}
    model["checksums"] = _each(model, checksums)
    place = run / "model"
    beside = place.with_name(".model.part")  # all processes have to know the name
    try:
        on_first_process(lambda: _remove(beside))  # of a process that was killed
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(beside.absolute(), model)
        on_first_process(lambda: replace(beside, place))
    except Exception as error:  # of the system, of tensorstore or of orbax
        if is_first_process():
            _remove(beside)
        raise cannot_write(place, error) from error


def load_model(
    run: Path, like: Any, say: Callable[[str], None] = lambda message: None
) -> tuple[Any, Any]:
    """Reads the model of a run, see `read_model`, onto the devices of a state.

    It ignores the optimiser's state, which may be from an earlier version.

    Args:
      run: the run's directory.
      like: the training state of such a run, arrays or their shapes.
      say: see `restore`.

    Returns:
      The parameters, averaged ones if the run keeps them, and the batch statistics.

    Raises:
      RunError: there is none, it is damaged, or it does not match.
    """
    params, batch_stats = read_model(run, say)
    stored = dict(named_leaves({"params": params, "batch_stats": batch_stats}))
    wanted = {"params": like.judged, "batch_stats": like.batch_stats}
    _check_same(run, _shapes(stored), _shapes(wanted), run)

    def put(path: Any, ours: Any) -> jax.Array:
        sharding = ours.sharding if isinstance(ours, jax.Array) else None
        return jax.device_put(stored[leaf_path(path)], sharding)

    model = jax.tree.map_with_path(put, wanted)
    return model["params"], model["batch_stats"]


def read_model(
    run: Path, say: Callable[[str], None] = lambda message: None
) -> tuple[Any, Any]:
    """Reads the model of a run: what `save_model` wrote, or the last intact checkpoint.

    Args:
      run: the run's directory.
      say: see `restore`.

    Returns:
      The parameters, averaged ones if the run keeps them, and the batch statistics, as
      trees of NumPy arrays.

    Raises:
      RunError: it holds none, or a damaged one.
    """
    load_config(run)  # raises if the directory is not a run
    places = [run / "model"]
    if not places[0].exists():
        steps = sorted(_steps(run), reverse=True)
        places = [run / "checkpoints" / str(step) / "default" for step in steps]
    if not places:
        raise _no_checkpoint(run)
    problems = []
    for place in places:
        try:
            model = _read_tree(place)
            _check_whole(model, place)
        except RunError as error:
            problems.append(error)
            if place != places[-1]:
                say(f"{error}; using the previous checkpoint")
            continue
        averaged = model.get("ema")
        params = averaged if jax.tree.leaves(averaged) else model["params"]
        return params, model.get("batch_stats") or {}
    raise problems[0]


def latest_step(run: Path) -> int | None:
    """The step of the last checkpoint, None if there is none."""
    return max(_steps(run), default=None)


def check_finite(tree: Any, place: str) -> None:
    """Raises unless all numbers are finite.

    Raises:
      NonFiniteLoss: the message names the place.
    """
    if not bool(_all_finite(tree)):
        raise NonFiniteLoss(
            f"weights {place} are not finite; a lower learning rate or rho may help"
        )


def _remove(folder: Path) -> None:
    """Removes a folder and what Orbax calls it until it is complete."""
    for path in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(path, ignore_errors=True)


def _each(trees: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """Applied to every tree that has leaves: Orbax stores no empty arrays."""
    return {
        name: function(tree) for name, tree in trees.items() if jax.tree.leaves(tree)
    }


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


class _OtherModel(RunError):
    """A checkpoint is intact, but from a different configuration."""


def _check_fits(place: Path, abstract: Any, run: Path) -> None:
    """Raises if a readable checkpoint does not have the run's structure."""
    try:
        handler = ocp.PyTreeCheckpointHandler()
        with ocp.Checkpointer(handler) as checkpointer:
            stored = checkpointer.metadata(place.absolute()).item_metadata.tree
    except Exception:  # of json, of tensorstore or of orbax: it is damaged
        return
    _check_same(place, _types(stored), _types(abstract), run)


def _check_same(
    place: Path,
    there: dict[str, str],
    here: dict[str, str],
    run: Path,
) -> None:
    if there != here:
        path = min(p for p in {*there, *here} if there.get(p) != here.get(p))
        raise _OtherModel(
            f"{place} is of another configuration than {run / 'config.json'}: "
            f"{path} is {there.get(path, 'missing')} there and "
            f"{here.get(path, 'missing')} here"
        )


def _shapes(tree: Any) -> dict[str, str]:
    return {name: str(leaf.shape) for name, leaf in _stored_form(tree).items()}


def _types(tree: Any) -> dict[str, str]:
    return {
        name: f"{leaf.dtype}{list(leaf.shape)}"
        for name, leaf in _stored_form(tree).items()
    }


def _stored_form(tree: Any) -> dict[str, Any]:
    """The leaves by path, random keys as the integers that are stored of them."""
    return {
        name: jax.eval_shape(jax.random.key_data, leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for name, leaf in named_leaves(tree)
    }


def _check_whole(stored: Any, place: Path) -> None:
    expected = stored["checksums"]
    for name in expected:
        if not np.array_equal(checksums(stored[name]), np.asarray(expected[name])):
            raise RunError(f"{place} is damaged: the checksums of its {name} differ")


def _read_tree(directory: Path) -> Any:
    handler = ocp.PyTreeCheckpointHandler()
    with reading(directory), ocp.Checkpointer(handler) as checkpointer:
        stored = checkpointer.metadata(directory.absolute()).item_metadata.tree
        wanted = {name: stored[name] for name in MODEL if stored.get(name) is not None}
        wanted["checksums"] = {
            name: sums for name, sums in stored["checksums"].items() if name in wanted
        }
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted
        )
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        return checkpointer.restore(
            directory.absolute(),
            ocp.args.PyTreeRestore(
                abstract,
                restore_args=jax.tree.map(lambda _: as_numpy, abstract),
                partial_restore=True,
            ),
        )


def _steps(run: Path) -> list[int]:
    names = (path.name for path in (run / "checkpoints").glob("*"))
    return [int(name) for name in names if name.isdecimal()]


def _no_checkpoint(run: Path) -> RunError:
    return RunError(f"{run} holds no checkpoint; train it with {resume_command(run)}")
