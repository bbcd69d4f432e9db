"""Training: the loop, from claiming a directory to the last checkpoint."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.progress import Progress

from experiments.batches import Batch, Source
from experiments.config import RunConfig
from experiments.errors import (
    ConfigError,
    NonFiniteLoss,
    RunError,
    Stopped,
)
from experiments.images.data import Dataset
from experiments.runs import checkpoints
from experiments.runs.claim import claim
from experiments.runs.directory import (
    evaluate_command,
    read_status,
    resume_command,
    write_status,
)
from experiments.runs.loggers import LOGGERS, LoggerName
from experiments.runs.metrics import Metrics, Report
from experiments.sharding import (
    assemble,
    is_first_process,
    own_rows,
    state_shardings,
)
from experiments.task import Task, format_metrics
from experiments.training.distillation import load_teacher
from experiments.training.early_stopping import Stopping
from experiments.training.signals import caught_signals
from experiments.training.step import (
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
    steps_per_epoch,
    total_steps,
)
from experiments.training.warm_start import initial_model


class Cadence(NamedTuple):
    """When checkpoints are saved, in addition to those of the configuration.

    Attributes:
      steps: steps between checkpoints; 0: not by steps.
      minutes: minutes between checkpoints; 0: not by time. Only for one process.
      keep: how many of the last checkpoints are kept.
    """

    steps: int = 0
    minutes: float = 0.0
    keep: int = 2


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
    cadence: Cadence | None = None,
    max_steps: int | None = None,
    patience_from: int = 0,
    loggers: tuple[LoggerName, ...] = (),
    notes: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> TrainState:
    """Trains a network and leaves everything about it in a run directory.

    Args:
      config: the run.
      run: its directory: config.json, status.json, metrics.jsonl, checkpoints.
      data: the examples.
      task: what to learn.
      progress: where to show progress.
      mesh: the devices to share the work, see `experiments.sharding`.
      train_step: from `make_train_step`, to share a compilation among seeds.
      resume: continue from the last intact checkpoint; the result is the same, bit for
        bit, as that of a run that was never stopped.
      overwrite: remove an earlier run in the directory.
      cadence: when to save checkpoints in between.
      max_steps: stop at this step, with a checkpoint; the schedule stays that of the
        whole run.
      patience_from: evaluations up to this step do not count against the patience.
      loggers: where metrics go in addition to metrics.jsonl.
      notes: further entries of status.json.
      quiet: print only the bar.

    Returns:
      The last state; with ``patience`` the best model is stored beside it.

    Raises:
      RunError: the directory holds a run, or not the one to resume; another process is
        writing it; or a run to resume has lost or gained examples.
      WeightsError: what ``init_from`` names does not fit.
      NonFiniteLoss: the loss or the weights are not finite.
      Stopped: a signal arrived; a checkpoint is saved, and the run may be complete.
    """
    report = Report(progress, quiet=quiet)
    cadence = cadence or Cadence()
    starts = not resume or checkpoints.latest_step(run) is None
    if not starts:
        _check_examples(run, data)
    # Before the directory is claimed, as it may not fit.
    model = initial_model(config, task) if starts else None
    teacher = load_teacher(config, data, task) if train_step is None else None
    steps = total_steps(config, data)
    if steps >= 2**31:
        raise ConfigError(f"epochs={config.epochs} are {steps} steps, more than 2^31")
    if train_step is None:
        train_step = make_train_step(config, data, task, mesh, teacher)
        if starts:
            _check_step(config, data, task, train_step)
    last = min(steps, max_steps or steps)
    with contextlib.ExitStack() as stack:
        claim(stack, run, config, report, resume=resume, overwrite=overwrite)
        state = initial_state(config, data, task, mesh, model)
        manager = stack.enter_context(checkpoints.manager(run, cadence.keep))
        if not starts:
            state = checkpoints.restore(manager, state, report.say)
        start = int(state.step)
        stopping = Stopping(config, run, task.metric, start, patience_from)
        status = partial(_write_status, run, steps=steps)
        status("training", start, examples=data.train.size, **(notes or {}))
        writes = is_first_process()
        made = [LOGGERS[name](run, config, start) for name in loggers if writes]
        metrics = stack.enter_context(Metrics(run, start, enabled=writes, loggers=made))
        bar = progress.add_task(run.name, total=steps, completed=start, note="")
        stack.callback(progress.remove_task, bar)
        caught = stack.enter_context(caught_signals())
        stack.enter_context(_noted_divergence(status, caught))

        epoch = steps_per_epoch(config, data)
        evaluate_every = math.ceil(round(config.evaluate_every * epoch, 6))

        def evaluate(step: int, state: TrainState) -> None:
            result = task.evaluate(state.judged, state.batch_stats, data.evaluation)
            _check_metrics(result, step)
            stopping.judge(step, result, state.judged, state.batch_stats)
            # Only now: a resumed run repeats an evaluation that has no line.
            metrics.write(step, {f"eval_{k}": v for k, v in result.items()})
            report.say(
                f"{run.name}: step {step}/{steps}, evaluated: {format_metrics(result)}"
            )

        if stopping.evaluation_is_missing and (
            start == steps or _due(start, evaluate_every)
        ):
            evaluate(start, state)
        step, pending, saved_at = start, [], time.monotonic()
        stop = start if stopping.is_due else last
        batches = batches_of(config, data.train, start, stop, mesh)
        if start < stop:
            progress.update(bar, note="compiling ...")
            report.say_off_terminal(f"{run.name}: compiling the training step ...")
        for step, batch in enumerate(batches, start + 1):
            state, values = train_step(state, batch)
            pending.append(values)

            minutes = (time.monotonic() - saved_at) / 60
            stopped = bool(caught)  # asked once: a signal may arrive at any moment
            saving = (
                step == last
                or stopped
                or _due(step, config.checkpoint_every * epoch)
                or _due(step, cadence.steps)
                or 0 < cadence.minutes <= minutes
            )
            evaluating = step == steps or _due(step, evaluate_every)
            # An evaluation that fails is repeated where the last line has none.
            is_due = evaluating or _due(step, config.log_every) or step % epoch == 0
            if saving or is_due:
                averages = _fetch(pending, step)
                metrics.write(step, averages | {"epoch": step / epoch})
                note = f"loss {averages['loss']:.3f}"
                progress.update(bar, completed=step, note=note)
                report.say_off_terminal(
                    f"{run.name}: step {step}/{steps}, epoch {step / epoch:.2f}, {note}"
                )
                pending = []
            if saving:  # before the evaluation, which may fail
                checkpoints.save(manager, state)
                saved_at = time.monotonic()
                status("training", step)
            if evaluating:
                try:
                    evaluate(step, state)
                except NonFiniteLoss:
                    raise  # the last checkpoint may be finite
                except Exception:
                    if not saving:
                        checkpoints.save(manager, state)
                        status("training", step)
                    raise
                if stopping.is_due and not saving:
                    checkpoints.save(manager, state)
            if stopping.is_due or stopped:
                break
        ended = step == steps or stopping.is_due
        status("finished" if ended else "interrupted", step)
    if caught and ended:  # whoever trains several runs has to stop as well
        raise Stopped(
            f"stopped after the last step; {run} is complete, go on with\n  "
            f"{evaluate_command(run)}",
            caught[0],
        )
    if caught:
        raise Stopped(
            f"stopped at step {step} of {steps}, where a checkpoint is saved; go on "
            f"with\n  {resume_command(run)}",
            caught[0],
        )
    return state


def _check_step(config: RunConfig, data: Dataset, task: Task, step: TrainStep) -> None:
    """Traces a step: options that do not fit must not cost an earlier run."""
    state = jax.eval_shape(partial(init_state, config, data, task))
    if config.optimizer.plain_steps:  # which program it is depends on numbers
        return
    size = config.data.batch_size
    batch = {
        name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
        for name, array in data.train.take([0]).items()
    }
    jax.eval_shape(step, state, batch)


def _check_examples(run: Path, data: Dataset) -> None:
    """Raises if a run would go on with other examples, in another order."""
    before = read_status(run).get("examples", data.train.size)
    if before != data.train.size:
        raise RunError(
            f"{run} was started with {before} training examples, and there are "
            f"{data.train.size} now: restore its data, or train a new run from it with "
            f"--init-from {run}"
        )


def initial_state(
    config: RunConfig,
    data: Dataset,
    task: Task,
    mesh: Mesh | None,
    model: tuple[Any, Any] | None,
) -> TrainState:
    """The state before the first step, over the devices of a mesh."""
    init = partial(init_state, config, data, task)
    if mesh is None:
        return init(model)
    # Every device makes its own part, so the whole need not fit on one.
    shardings = state_shardings(mesh, jax.eval_shape(init))
    return jax.jit(init, out_shardings=shardings)(model)


def batches_of(
    config: RunConfig, examples: Source, start: int, stop: int, mesh: Mesh | None
) -> Iterator[Batch]:
    """The batches of some steps; over a mesh a process reads only its own rows."""
    size = config.data.batch_size
    own = None if mesh is None else own_rows(mesh, size)
    for batch in examples.training_batches(size, config.seed, start, stop, own):
        if mesh is not None and own is not None:
            batch = {n: assemble(mesh, rows, own, size) for n, rows in batch.items()}
        yield batch


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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


def _check_metrics(result: Mapping[str, float], step: int) -> None:
    for name, value in result.items():
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the evaluated {name} is {value} at step {step}")


def _write_status(
    run: Path, state: str, step: int, *, steps: int, **values: Any
) -> None:
    if is_first_process():
        write_status(run, state=state, step=step, steps=steps, **values)


@contextlib.contextmanager
def _noted_divergence(status: Any, caught: list[int]) -> Iterator[None]:
    """Records what ended a run, for those who evaluate it later."""
    try:
        yield
    except NonFiniteLoss as error:
        with contextlib.suppress(RunError):
            if is_first_process():
                status("diverged", -1, why=str(error))
        if caught:  # a comparison goes on after a divergence
            raise Stopped(f"stopped; {error}", caught[0]) from error
        raise
