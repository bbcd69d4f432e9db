"""What the subcommands do."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import cram_jax
from experiments import checkpoints, targets
from experiments import demo as demo_module
from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.evaluation import evaluate_target, has_statistics, make_evaluation
from experiments.kinds import prepare
from experiments.metrics import make_console, progress_bar
from experiments.report import gather, write_report
from experiments.results import accuracy_table, add_run, new_results, save_results
from experiments.run_directory import cannot_write, write_text
from experiments.second_order import SecondOrder
from experiments.sharding import is_first_process, make_mesh
from experiments.task import Task, describe
from experiments.text.config import TextConfig
from experiments.text.data import vocabulary
from experiments.text.huggingface import save_bert
from experiments.text.network import network
from experiments.text.tokenization import vocabulary_files
from experiments.training import init_state
from experiments.training import train as run_training
from experiments.unfinished import digest, resumable
from experiments.warm_start import check_source


def train(
    config: RunConfig,
    run: Path | None,
    data_dir: Path | None,
    mesh: str | None,
    workers: int,
    resume: bool,
    overwrite: bool,
) -> None:
    """Trains, and says what the directory holds."""
    name = f"{config.name}-{config.optimizer.method_name}-seed{config.seed}"
    if workers < 0:
        raise ConfigError(f"workers must be at least 0, got {workers}")
    check_source(config)
    run = run or Path("runs") / name
    console = make_console(quiet=not is_first_process())
    devices = make_mesh(mesh, config.data.batch_size)
    data, task = prepare(config, data_dir, workers=workers)
    with progress_bar(console) as progress:
        state = run_training(
            config,
            run,
            data,
            task,
            progress,
            mesh=devices,
            resume=resume,
            overwrite=overwrite,
        )
    model, best = (state.params, state.batch_stats), ""
    if config.patience:
        model, best = checkpoints.load_model(run, state), "; the best model: "
    result = task.evaluate(*model, data.evaluation)
    console.print(
        f"{run}: {int(state.step)} steps{best or ', '}{describe(result)}\n"
        f"Next: python -m experiments evaluate {run}",
        highlight=False,
        soft_wrap=True,
    )


def compress(
    run: Path,
    target: str,
    out: Path | None,
    data_dir: Path | None,
    second_order: SecondOrder,
) -> None:
    """Compresses, recalibrates batch norm, stores the model, prints what is left."""
    targets.check(target)
    config, data, task, params, batch_stats = _load(run, data_dir)
    evaluation = make_evaluation(config, data, task, second_order)
    before = evaluation.accuracy(params, batch_stats)
    compressed, masks = evaluation.compress(params, target, batch_stats)
    statistics = evaluation.recalibrate(compressed, batch_stats)
    after = evaluation.accuracy(compressed, statistics)

    out = out or run / "compressed" / target
    checkpoints.save_model(out, config, compressed, statistics)
    facts = {"source": str(run), "projector": target, task.metric: after}
    write_text(out / "compression.json", json.dumps(facts, indent=2) + "\n")
    console = make_console()
    report = cram_jax.sparsity_report(compressed, masks)
    console.print(str(report), highlight=False, soft_wrap=True)
    recalibrated = " with batch norm recalibrated" if has_statistics(statistics) else ""
    console.print(
        f"\n{task.metric.capitalize()} {before:.2f} % dense, {after:.2f} % as "
        f"{targets.label(target)}{recalibrated}. Stored in {out}",
        highlight=False,
        soft_wrap=True,
    )


def evaluate(
    run: Path,
    names: tuple[str, ...],
    calibrations: int,
    data_dir: Path | None,
    second_order: SecondOrder,
) -> None:
    """Prints the accuracy on every target and stores it in evaluation.json."""
    if calibrations < 1:
        raise ConfigError(f"calibrations must be at least 1, got {calibrations}")
    for name in names:
        targets.check(name)
    config, data, task, params, batch_stats = _load(run, data_dir)
    compressed = (run / "compression.json").exists()
    names = names or (("dense",) if compressed else config.targets)
    console = make_console()
    results = new_results(names, task.metric)
    evaluation = make_evaluation(config, data, task, second_order)
    unfinished = run / "evaluation.part.json"
    depends_on = {
        "model": digest((params, batch_stats)),
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
    add_run(results, config.optimizer.method_name, config, accuracies, seconds)
    save_results(results, run / "evaluation.json")
    unfinished.unlink(missing_ok=True)
    drawn = calibrations > 1 and has_statistics(batch_stats)
    draws = f", {calibrations} calibrations" if drawn else ""
    console.print(f"{run}:", highlight=False, soft_wrap=True)
    console.print(accuracy_table(results, f"{task.metric} (%){draws}"))


def report(runs: tuple[Path, ...], out: Path) -> None:
    """Writes tables and pictures of evaluated runs, grouped by method."""
    files = write_report(gather(runs), out)
    make_console().print("\n".join(map(str, files)), highlight=False, soft_wrap=True)


def demo(run: Path, seeds: int, epochs: int | None, data_dir: Path | None) -> None:
    """Runs the main job."""
    demo_module.demo(run, seeds, make_console(), epochs=epochs, data_dir=data_dir)


def export(run: Path, out: Path) -> None:
    """Writes the model of a run on text as Hugging Face stores it."""
    config = checkpoints.load_config(run)
    if not isinstance(config, TextConfig):
        raise ConfigError(f"{run} is a run on images; export writes those on text")
    files = vocabulary_files(vocabulary(config))
    params, _ = checkpoints.read_model(run)
    try:
        save_bert(out, network(config).module(params))
        for file in files:
            shutil.copy(file, out)
    except OSError as error:
        raise cannot_write(out, error) from error
    names = sorted(path.name for path in out.iterdir())
    make_console().print(f"{out}: {', '.join(names)}", soft_wrap=True)


def _load(run: Path, data_dir: Path | None) -> tuple[RunConfig, Any, Task, Any, Any]:
    config = checkpoints.load_config(run)
    data, task = prepare(config, data_dir)
    like = init_state(config, data, task)
    return config, data, task, *checkpoints.load_model(run, like)
