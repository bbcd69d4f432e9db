"""What the subcommands do."""

import dataclasses
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

import cram_jax
from experiments import checkpoints, targets
from experiments import demo as demo_module
from experiments.config import RunConfig
from experiments.datasets import default_data_dir
from experiments.display import accuracy_table
from experiments.errors import ConfigError, NonFiniteLoss, command_line
from experiments.evaluation import evaluate_target, has_statistics, make_evaluation
from experiments.kinds import kind_of, prepare
from experiments.loggers import LoggerName, check_loggers
from experiments.metrics import make_console, progress_bar
from experiments.results import (
    Results,
    add_run,
    digest,
    load_results,
    merged,
    new_results,
    save_results,
)
from experiments.run_directory import (
    check_free,
    check_path,
    load_config,
    read_status,
    state_of,
    write_status,
    write_text,
)
from experiments.second_order import SecondOrder
from experiments.sharding import is_first_process, make_mesh
from experiments.step import init_state, make_train_step, total_steps
from experiments.task import Task, format_metrics
from experiments.training import Cadence
from experiments.training import train as run_training
from experiments.unfinished import resumable
from experiments.warm_start import check_source, initial_model


class Conduct(NamedTuple):
    """How a run is carried out; none of it changes a number of the result.

    Attributes:
      run: its directory; None: runs/NAME-RULE-seedSEED.
      data_dir: where tensorflow-datasets keeps its data; None: the user's cache, or
        that of the run that goes on.
      mesh: devices, see `make_mesh`.
      workers: processes that decode large images; 0: threads.
      resume: go on from the last checkpoint.
      overwrite: remove an earlier run in the directory.
      cadence: of checkpoints.
      max_steps: stop here, with a checkpoint.
      dry_run: build everything, take one step, write nothing.
      loggers: where figures go beside metrics.jsonl.
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
    """Trains, and says what the directory holds."""
    _check(conduct)
    console = make_console(quiet=not is_first_process())
    say = partial(console.print, soft_wrap=True)
    name = f"{config.name}-{config.optimizer.rule_name}-seed{config.seed}"
    run = conduct.run or Path("runs") / name
    # All that can be known beforehand, before anything takes time.
    check_path(run)
    if not conduct.resume and not conduct.dry_run:
        check_free(run, overwrite=conduct.overwrite)
    check_loggers(conduct.loggers)
    if not conduct.resume:
        config = kind_of(config).resolve(config)
        check_source(config)
    devices = make_mesh(conduct.mesh, config.data.batch_size)
    data_dir = conduct.data_dir or _data_dir(run)
    sources = kind_of(config).kept_sources(config, run) if conduct.resume else config
    data, task = prepare(sources, data_dir, workers=conduct.workers)
    used = config.optimizer.train_targets if _compresses(config) else ()
    check_targets((*used, *config.eval_targets), config, task)
    if conduct.dry_run:
        _dry_run(config, data, task, say)
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
            notes={"data_dir": str((data_dir or default_data_dir()).absolute())},
            quiet=False,
        )
    if unfinished := state_of(run):
        command = command_line("train", "--resume", run)
        say(f"{unfinished}. Go on with\n  {command}")
        return
    model, best = (state.judged, state.batch_stats), ", "
    if config.patience:
        model, best = checkpoints.load_model(run, state), "; the best model: "
    result = task.evaluate(*model, data.evaluation)
    say(f"{run}: {int(state.step)} steps{best}{format_metrics(result)}")
    say(f"Next:\n  {command_line('evaluate', run)}")


def compress(
    run: Path,
    target: str,
    out: Path | None,
    overwrite: bool,
    data_dir: Path | None,
    second_order: SecondOrder,
) -> None:
    """Compresses, recalibrates batch norm, stores the model, prints what is left."""
    out = out or run / "compressed" / target
    check_path(out)
    if out.exists() and out.resolve() in (run.resolve(), *run.resolve().parents):
        raise ConfigError(f"out must be a directory of its own, got {out}, the run's")
    if not (out / "compression.json").exists():  # one of ours is made anew
        check_free(out, overwrite=overwrite)
    console = make_console()
    say = partial(console.print, soft_wrap=True)
    config, data, task, params, batch_stats = _load(run, data_dir, say)
    check_targets((target,), config, task)
    evaluation = make_evaluation(config, data, task, second_order)
    before = evaluation.accuracy(params, batch_stats)
    compressed, masks = evaluation.compress(params, target, batch_stats)
    statistics = evaluation.recalibrate(compressed, batch_stats)
    after = evaluation.accuracy(compressed, statistics)

    stored = load_config(run)
    checkpoints.save_model(out, stored, compressed, statistics)
    kind_of(config).keep_sources(config, out)
    facts = {"source": str(run), "target": target, task.metric: after}
    write_text(out / "compression.json", json.dumps(facts, indent=2) + "\n")
    found = data_dir or _data_dir(run) or default_data_dir()
    write_status(out, data_dir=str(found.absolute()))
    say(str(cram_jax.sparsity_report(compressed, masks)))
    recalibrated = " with batch norm recalibrated" if has_statistics(statistics) else ""
    say(
        f"\n{task.metric.capitalize()} {before:.2f} % dense, {after:.2f} % as "
        f"{targets.label(target)}{recalibrated}. Stored in {out}"
    )


def evaluate(
    run: Path,
    names: tuple[str, ...],
    calibrations: int,
    out: Path | None,
    data_dir: Path | None,
    second_order: SecondOrder,
) -> None:
    """Prints the accuracy on every target and stores it in evaluation.json."""
    out = out or run / "evaluation.json"
    if out.suffix != ".json":
        raise ConfigError(f"out must be a file ending in .json, got {out}")
    if out.exists():
        load_results(out)  # says what is wrong with it before hours are spent
    console = make_console()
    say = partial(console.print, soft_wrap=True)
    config, data, task, params, batch_stats = _load(run, data_dir, say)
    compressed = (run / "compression.json").exists()
    names = tuple(dict.fromkeys(names))
    names = names or (("dense",) if compressed else config.eval_targets)
    check_targets(names, config, task)
    results = new_results(names, task.metric)
    evaluation = make_evaluation(config, data, task, second_order)
    unfinished = out.with_name(f"{out.stem}.part.json")
    model = digest((params, batch_stats))
    depends_on = {
        "model": model,
        "data_dir": str(data_dir),
        "calibrations": calibrations,
        "second_order": dataclasses.asdict(second_order),
        "versions": results["versions"],
    }
    accuracies, seconds = [], 0.0
    with progress_bar(console) as progress:
        bar = progress.add_task("targets", total=len(names), note="")
        for accuracy, duration in resumable(
            unfinished,
            depends_on,
            names,
            partial(
                evaluate_target,
                evaluation,
                params,
                batch_stats,
                calibrations=calibrations,
            ),
        ):
            accuracies.append(accuracy)
            seconds += duration
            progress.update(bar, advance=1, note=accuracy.target)
            if not console.is_terminal:
                say(f"{accuracy.target}: {accuracy.pruned:.2f} % ({duration:.1f} s)")
    rule = config.optimizer.rule_name
    add_run(results, rule, load_config(run), accuracies, seconds, model)
    save_results(_with_earlier(results, out, say), out)
    unfinished.unlink(missing_ok=True)
    drawn = calibrations > 1 and has_statistics(batch_stats)
    draws = f", {calibrations} calibrations" if drawn else ""
    say(f"{run}:")
    console.print(accuracy_table(results, f"{task.metric} (%){draws}"))


def export(run: Path, out: Path, vocabulary: Path | None) -> None:
    """Writes the model of a run on text as Hugging Face stores it."""
    config = load_config(run)
    if out.exists() and out.resolve() == run.resolve():
        raise ConfigError(f"out must be a directory of its own, got {out}, the run's")
    params, _ = checkpoints.read_model(run)
    kind_of(config).export(config, params, run, out, vocabulary)
    names = sorted(path.name for path in out.iterdir())
    make_console().print(f"{out}: {', '.join(names)}", soft_wrap=True)


def demo(run: Path, seeds: int, epochs: int | None, data_dir: Path | None) -> None:
    """Runs the main job."""
    demo_module.demo(run, seeds, make_console(), epochs=epochs, data_dir=data_dir)


def check_targets(names: tuple[str, ...], config: RunConfig, task: Task) -> None:
    """Raises if a target fits no layer of a network; nothing is computed.

    Raises:
      ConfigError: it names the target.
    """
    params = jax.eval_shape(task.init, 0)[0]
    for name in dict.fromkeys(names):
        if not {part.form for part in targets.parse(name)} & {"n of m", "blocks"}:
            continue
        projector = targets.projector(
            name, filters=task.filters, second_order=lambda _: cram_jax.identity()
        )
        try:
            jax.eval_shape(partial(cram_jax.compress, projector=projector), params)
        except ValueError as error:
            reason = str(error).split(", got shapes")[0]
            raise ConfigError(
                f"target {name!r} fits no layer of {config.model.title}: {reason}"
            ) from error


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


def _compresses(config: RunConfig) -> bool:
    return config.optimizer.rule not in ("none", "sam")


def _dry_run(config: RunConfig, data: Any, task: Task, say: Any) -> None:
    """One step of a run, of which nothing is stored."""
    state = init_state(config, data, task, initial_model(config, task))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(
        f"{config.name}: {config.model.title}, {count:,} parameters; "
        f"{data.train.size:,} examples, {total_steps(config, data):,} steps"
    )
    say("compiling the training step ...")
    step = make_train_step(config, data, task)
    batches = data.train.training_batches(config.data.batch_size, config.seed, 0, 1)
    start = time.perf_counter()
    _, values = step(state, next(iter(batches)))
    loss = float(values["loss"])
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"the loss of the first step is {loss}")
    say(
        f"one step: loss {loss:.4f}, {time.perf_counter() - start:.1f} s with compiling"
    )


def _with_earlier(results: Results, out: Path, say: Any) -> Results:
    """Results with those that lie there, or these apart if of another model."""
    if not out.exists():
        return results
    earlier = load_results(out)
    both = merged(earlier, results)
    if both is not None:
        return both
    number = 1
    while (aside := out.with_name(f"{out.stem}.{number}.json")).exists():
        number += 1
    out.rename(aside)
    say(f"{out} was of another model; it is now {aside}")
    return results


def _load(
    run: Path, data_dir: Path | None, say: Any
) -> tuple[RunConfig, Any, Task, Any, Any]:
    config = load_config(run)
    if note := state_of(run):
        say(f"note: {note}")
    if "diverged" in note:
        say("note: what follows is of its last checkpoint before that")
    config = kind_of(config).kept_sources(config, run)
    data, task = prepare(config, data_dir or _data_dir(run))
    like = jax.eval_shape(partial(init_state, config, data, task))
    return config, data, task, *checkpoints.load_model(run, like, say)


def _data_dir(run: Path) -> Path | None:
    """Where a run found its data, or the run that it was made from."""
    stored = read_status(run).get("data_dir")
    return Path(stored) if isinstance(stored, str) and stored else None
