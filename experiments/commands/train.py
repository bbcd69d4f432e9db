"""Trains a run from a configuration, or resumes one."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from experiments.config import RunConfig
from experiments.datasets import data_dir_note
from experiments.errors import ConfigError, NonFiniteLoss
from experiments.evaluation.evaluation import check_targets
from experiments.evaluation.open_run import stored_data_dir
from experiments.kinds import kind_of, prepare
from experiments.methods.config import trains_for_one
from experiments.runs import checkpoints
from experiments.runs.directory import (
    check_free,
    check_path,
    check_resumable,
    evaluate_command,
    resume_command,
    state_of,
)
from experiments.runs.loggers import LoggerName, check_loggers
from experiments.runs.metrics import make_console, progress_bar
from experiments.sharding import is_first_process, make_mesh
from experiments.task import Task, format_metrics
from experiments.training.distillation import check_teacher, load_teacher
from experiments.training.loop import Cadence, batches_of, initial_state
from experiments.training.loop import train as run_training
from experiments.training.step import make_train_step, total_steps
from experiments.training.warm_start import check_source, initial_model


class Conduct(NamedTuple):
    """How a run is carried out; none of it changes a number of the result.

    Attributes:
      run: its directory; None: runs/NAME-RULE-seedSEED.
      data_dir: where tensorflow-datasets keeps its data; None: the user's cache, or
        where the resumed run found them.
      mesh: devices, see `make_mesh`.
      workers: processes that decode large images; 0: threads.
      resume: continue from the last checkpoint.
      overwrite: remove an earlier run in the directory.
      cadence: of checkpoints.
      max_steps: stop here, with a checkpoint.
      dry_run: build everything, take one step, write nothing.
      loggers: where metrics go in addition to metrics.jsonl.
    """

    run: Path | None = None
    data_dir: Path | None = None
    mesh: str | None = None
    workers: int = 0
    resume: bool = False
    overwrite: bool = False
    cadence: Cadence = Cadence()
    max_steps: int | None = None
    dry_run: bool = False
    loggers: tuple[LoggerName, ...] = ()


def train(config: RunConfig, conduct: Conduct) -> None:
    """Trains, and prints the result and the next command."""
    _check(conduct)
    console = make_console(quiet=not is_first_process())
    say = partial(console.print, soft_wrap=True)
    name = f"{config.name}-{config.optimizer.rule_name}-seed{config.seed}"
    run = conduct.run or Path("runs") / name
    # Everything that can be checked before anything takes time.
    check_path(run)
    if conduct.resume:
        check_resumable(run)
    elif not conduct.dry_run:
        check_free(run, overwrite=conduct.overwrite)
    check_loggers(conduct.loggers)
    if not conduct.resume:
        config = kind_of(config).resolve(config)
        check_source(config)
    if config.teacher is not None:
        check_teacher(config)
    devices = make_mesh(conduct.mesh, config.data.batch_size)
    before = stored_data_dir(run) if conduct.resume else None
    data_dir = conduct.data_dir or before
    sources = kind_of(config).kept_sources(config, run) if conduct.resume else config
    data, task = prepare(sources, data_dir, workers=conduct.workers)
    used = config.optimizer.train_targets if _compresses(config) else ()
    check_targets((*used, *config.eval_targets), config, task)
    if conduct.dry_run:
        _dry_run(config, data, task, devices, say)
        return
    with progress_bar(console) as progress:
        state = run_training(
            config,
            run,
            data,
            task,
            progress,
            mesh=devices,
            resume=conduct.resume,
            overwrite=conduct.overwrite,
            cadence=conduct.cadence,
            max_steps=conduct.max_steps,
            loggers=conduct.loggers,
            notes=data_dir_note(data_dir),
            quiet=False,
        )
    if unfinished := state_of(run):
        say(f"{unfinished}. Resume with\n  {resume_command(run)}")
        return
    model, best = (state.judged, state.batch_stats), ", "
    if config.patience:
        model, best = checkpoints.load_model(run, state), "; the best model: "
    result = task.evaluate(*model, data.evaluation)
    say(f"{run}: {int(state.step)} steps{best}{format_metrics(result)}")
    if trains_for_one(config.optimizer.rule):
        say(
            f"{100 * task.zeros(model[0]):.1f} % of the prunable weights are zero; "
            f"{config.optimizer.train_targets[0]} was asked for"
        )
    say(f"Next:\n  {evaluate_command(run)}")


def _check(conduct: Conduct) -> None:
    for name, value, least in (
        ("workers", conduct.workers, 0),
        ("save_steps", conduct.cadence.steps, 0),
        ("save_minutes", conduct.cadence.minutes, 0),
        ("keep", conduct.cadence.keep, 1),
        ("max_steps", 1 if conduct.max_steps is None else conduct.max_steps, 1),
    ):
        if not least <= value < math.inf:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    if conduct.cadence.minutes and jax.process_count() > 1:  # clocks differ
        raise ConfigError(
            f"save_minutes must be 0 for several processes, which have to save at the "
            f"same step, got {conduct.cadence.minutes}; use --save-steps"
        )


def _compresses(config: RunConfig) -> bool:
    return config.optimizer.rule not in ("none", "sam")


def _dry_run(
    config: RunConfig, data: Any, task: Task, mesh: Mesh | None, say: Any
) -> None:
    """Takes one step of a run, and stores nothing."""
    state = initial_state(config, data, task, mesh, initial_model(config, task))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(
        f"{config.name}: {config.model.title}, {count:,} parameters; "
        f"{data.train.size:,} examples, {total_steps(config, data):,} steps"
    )
    say("compiling the training step ...")
    teacher = load_teacher(config, data, task)
    step = make_train_step(config, data, task, mesh, teacher)
    batch = next(batches_of(config, data.train, 0, 1, mesh))
    start = time.perf_counter()
    _, values = step(state, batch)
    loss = float(values["loss"])
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"the loss of the first step is {loss}")
    say(
        f"one step: loss {loss:.4f}, {time.perf_counter() - start:.1f} s with compiling"
    )
