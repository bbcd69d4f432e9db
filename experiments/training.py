"""Training: the state, the step, the loop."""

import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from rich.progress import Progress

from experiments import checkpoints
from experiments.batches import Batch, Source
from experiments.config import RunConfig
from experiments.early_stopping import Stopping
from experiments.errors import NonFiniteLoss, RunError
from experiments.images.data import Dataset
from experiments.metrics import Metrics
from experiments.optimizers import learning_rate, make_optimizer
from experiments.sharding import (
    assemble,
    is_first_process,
    on_first_process,
    own_rows,
    state_shardings,
)
from experiments.stored_config import differences
from experiments.task import Task
from experiments.warm_start import initial_model


class TrainState(NamedTuple):
    """All that changes in a run.

    Attributes:
      step: int32 scalar, the number of steps taken.
      params: the parameters.
      batch_stats: running statistics of batch normalisation.
      opt_state: state of the optimiser.
      key: PRNG key of the run, for augmentation and dropout; it stays the same.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    key: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def total_steps(config: RunConfig, data: Dataset) -> int:
    """Steps of a whole run."""
    return config.epochs * steps_per_epoch(config, data)


def steps_per_epoch(config: RunConfig, data: Dataset) -> int:
    """Whole batches among the training images."""
    return data.train.size // config.data.batch_size


def init_state(
    config: RunConfig, data: Dataset, task: Task, model: tuple[Any, Any] | None = None
) -> TrainState:
    """The state before the first step, a function of the configuration's seed.

    Args:
      config: the run.
      data: for the length of the schedule.
      task: what to learn.
      model: parameters and batch statistics; by default those of the seed.

    Returns:
      The state.
    """
    steps = total_steps(config, data)
    optimizer = make_optimizer(
        config.optimizer, task.loss_fn, steps, config.seed, task.layers
    )
    params, batch_stats = model or task.init(config.seed)
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        key=jax.random.key(config.seed),
    )


def make_train_step(
    config: RunConfig, data: Dataset, task: Task, mesh: Mesh | None = None
) -> TrainStep:
    """Compiles the training step. It serves every seed, and reuses the state's memory.

    Args:
      config: for the optimiser.
      data: for the length of the schedule.
      task: for the loss.
      mesh: keeps the state as `state_shardings` says.

    Returns:
      ``(state, batch) -> (state, metrics)``.
    """
    steps = total_steps(config, data)
    optimizer = make_optimizer(
        config.optimizer, task.loss_fn, steps, layers=task.layers
    )
    schedule = learning_rate(config.optimizer, steps)
    gradient_fn = jax.value_and_grad(task.loss_fn, has_aux=True)

    def train_step(
        state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        inputs = {
            "batch_stats": state.batch_stats,
            "batch": task.augment(key, batch),
            "dropout_key": jax.random.fold_in(key, 0),
        }
        (loss, batch_stats), grads = gradient_fn(state.params, **inputs)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, **inputs
        )
        params = optax.apply_updates(state.params, updates)

        metrics = {"loss": loss, "learning_rate": schedule(state.step)}
        compressed = optax.tree.get(opt_state, "compressed_loss")
        if compressed is not None:
            metrics["compressed_loss"] = compressed
        state = TrainState(state.step + 1, params, batch_stats, opt_state, state.key)
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(
                state, state_shardings(mesh, state)
            )
        return state, metrics

    return jax.jit(train_step, donate_argnames="state")


def train(
    config: RunConfig,
    run: Path,
    data: Dataset,
    task: Task,
    progress: Progress,
    *,
    mesh: Mesh | None = None,
    train_step: TrainStep | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainState:
    """Trains a network and leaves everything about it in a run directory.

    Args:
      config: the run.
      run: its directory: config.json, metrics.jsonl, TensorBoard events, checkpoints.
      data: the examples.
      task: what to learn.
      progress: where to show progress.
      mesh: the devices to share the work, see `experiments.sharding`.
      train_step: from `make_train_step`, to share a compilation among seeds.
      resume: go on from the last checkpoint; the result is the same, bit for bit, as
        that of a run that was never stopped.
      overwrite: remove what the directory holds.

    Returns:
      The last state; with ``patience`` the best model is stored beside it.

    Raises:
      RunError: the directory holds a run, or not the one to resume.
      WeightsError: what ``init_from`` names does not fit.
      NonFiniteLoss: the loss is infinite or not a number.
    """
    starts = not resume or checkpoints.latest_step(run) is None
    # Before the directory is claimed, as it may not fit.
    model = initial_model(config, task) if starts else None
    on_first_process(lambda: _claim(run, config, resume=resume, overwrite=overwrite))
    steps, epoch = total_steps(config, data), steps_per_epoch(config, data)
    evaluate_every = math.ceil(round(config.evaluate_every * epoch, 6))
    train_step = train_step or make_train_step(config, data, task, mesh)
    state = _initial_state(config, data, task, mesh, model)
    with checkpoints.manager(run) as manager:
        if not starts:
            state = checkpoints.restore(manager, state)
        start = int(state.step)
        bar = progress.add_task(run.name, total=steps, completed=start, note="")
        stopping = Stopping(config, run, task.metric, start)
        stop = start if stopping.is_due else steps
        batches = _batches(config, data.train, start, stop, mesh)
        with Metrics(run, start, enabled=is_first_process()) as metrics:
            pending = []
            for step, batch in enumerate(batches, start + 1):
                state, values = train_step(state, batch)
                pending.append(values)

                if step % config.log_every == 0 or step % epoch == 0 or step == steps:
                    averages = _fetch(pending, step)
                    metrics.write(step, averages | {"epoch": step / epoch})
                    note = f"loss {averages['loss']:.3f}"
                    progress.update(bar, completed=step, note=note)
                    pending = []
                if _due(step, evaluate_every, steps):
                    result = task.evaluate(
                        state.params, state.batch_stats, data.evaluation
                    )
                    metrics.write(step, {f"eval_{k}": v for k, v in result.items()})
                    stopping.judge(result, state.params, state.batch_stats)
                if stopping.is_due or _due(
                    step, config.checkpoint_every * epoch, steps
                ):
                    checkpoints.save(manager, state)
                if stopping.is_due:
                    break
        progress.remove_task(bar)
    return state


def _initial_state(
    config: RunConfig,
    data: Dataset,
    task: Task,
    mesh: Mesh | None,
    model: tuple[Any, Any] | None,
) -> TrainState:
    init = partial(init_state, config, data, task)
    if mesh is None:
        return init(model)
    # Every device makes its own part: the whole need not fit on one.
    shardings = state_shardings(mesh, jax.eval_shape(init))
    return jax.jit(init, out_shardings=shardings)(model)


def _batches(
    config: RunConfig, examples: Source, start: int, stop: int, mesh: Mesh | None
) -> Iterator[Batch]:
    """The batches of some steps; over a mesh a process reads only its own rows."""
    size = config.data.batch_size
    own = None if mesh is None else own_rows(mesh, size)
    for batch in examples.training_batches(size, config.seed, start, stop, own):
        if mesh is not None:
            batch = {n: assemble(mesh, rows, own, size) for n, rows in batch.items()}
        yield batch


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _fetch(pending: list[dict[str, jax.Array]], step: int) -> dict[str, float]:
    """Averages of the steps since the last fetch, the last of which is ``step``."""
    values = jax.device_get(pending)
    for index, value in enumerate(values, step - len(values) + 1):
        if not math.isfinite(value["loss"]):
            raise NonFiniteLoss(
                f"the loss is {value['loss']} at step {index}; a lower learning rate "
                f"or rho may help"
            )
    return {
        name: float(sum(value[name] for value in values) / len(values))
        for name in values[0]
    }


def _claim(run: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    if resume:
        changed = differences(config, checkpoints.load_config(run))
        if changed:
            raise RunError(
                f"{run} was started with another {', '.join(changed)}; resume it with "
                f"the configuration in its config.json"
            )
        return
    if run.exists() and any(run.iterdir()):
        if not overwrite:
            raise RunError(
                f"{run} is not empty: go on with --resume, start anew with "
                f"--overwrite, or choose another --run"
            )
        if not (run / "config.json").exists():
            raise RunError(f"{run} is no run: remove it yourself")
        shutil.rmtree(run)
    checkpoints.save_config(run, config)
