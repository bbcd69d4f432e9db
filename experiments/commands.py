"""What the subcommands do."""

import json
import time
from pathlib import Path

import cram_jax
from experiments import checkpoints, targets
from experiments import demo as demo_module
from experiments.comparison import gather, write_report
from experiments.config import Config
from experiments.data.images import Dataset, load
from experiments.errors import ConfigError
from experiments.evaluation import evaluate_targets, make_evaluation
from experiments.files import write_text
from experiments.initial import check_source
from experiments.metrics import make_console, progress_bar
from experiments.report import accuracy_table, add_run, new_results, save_results
from experiments.sharding import is_first_process, make_mesh
from experiments.tasks.classification import Task, classification
from experiments.training import init_state
from experiments.training import train as run_training


def train(
    config: Config,
    run: Path | None,
    data_dir: Path | None,
    mesh: str | None,
    workers: int,
    resume: bool,
    overwrite: bool,
) -> None:
    """Trains, and says what the directory holds."""
    name = f"{config.name}-{config.optimizer.method}-seed{config.seed}"
    if workers < 0:
        raise ConfigError(f"workers must be at least 0, got {workers}")
    check_source(config)
    run = run or Path("runs") / name
    console = make_console(quiet=not is_first_process())
    devices = make_mesh(mesh, config.data.batch_size)
    data = load(config.data, data_dir, workers=workers)
    task = classification(config, data)
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
    result = task.evaluate(state.params, state.batch_stats, data.evaluation)
    console.print(
        f"{run}: {int(state.step)} steps, accuracy {result['accuracy']:.2f} %, "
        f"loss {result['loss']:.4f}\n"
        f"Next: python -m experiments evaluate {run}",
        highlight=False,
        soft_wrap=True,
    )


def compress(run: Path, target: str, out: Path | None, data_dir: Path | None) -> None:
    """Compresses, recalibrates batch norm, stores the model, prints what is left."""
    targets.projector(target)
    config, data, task, params, batch_stats = _load(run, data_dir)
    evaluation = make_evaluation(config, data, task)
    before = evaluation.accuracy(params, batch_stats)
    compressed, masks = evaluation.compress(params, target)
    statistics = evaluation.recalibrate(compressed, batch_stats)
    after = evaluation.accuracy(compressed, statistics)

    out = out or run / "compressed" / target
    checkpoints.save_model(out, config, compressed, statistics)
    facts = {"source": str(run), "projector": target, "accuracy": after}
    write_text(out / "compression.json", json.dumps(facts, indent=2) + "\n")
    console = make_console()
    report = cram_jax.sparsity_report(compressed, masks)
    console.print(str(report), highlight=False, soft_wrap=True)
    console.print(
        f"\nAccuracy {before:.2f} % dense, {after:.2f} % as {targets.label(target)} "
        f"with batch norm recalibrated. Stored in {out}",
        highlight=False,
        soft_wrap=True,
    )


def evaluate(
    run: Path, names: tuple[str, ...], calibrations: int, data_dir: Path | None
) -> None:
    """Prints the accuracy on every target and stores it in evaluation.json."""
    if calibrations < 0:
        raise ConfigError(f"calibrations must be at least 0, got {calibrations}")
    for name in names:
        targets.projector(name)
    config, data, task, params, batch_stats = _load(run, data_dir)
    compressed = (run / "compression.json").exists()
    names = names or (("dense",) if compressed else config.targets)
    console = make_console()
    start = time.perf_counter()
    accuracies = []
    with progress_bar(console) as progress:
        bar = progress.add_task("targets", total=len(names), note="")
        evaluation = make_evaluation(config, data, task)
        for accuracy in evaluate_targets(
            evaluation, params, batch_stats, names, calibrations
        ):
            accuracies.append(accuracy)
            progress.update(bar, advance=1, note=accuracy.target)
    seconds = time.perf_counter() - start
    results = new_results(names)
    add_run(results, config.optimizer.method, config, accuracies, seconds)
    save_results(results, run / "evaluation.json")
    draws = f", {calibrations} calibrations" if calibrations > 1 else ""
    console.print(accuracy_table(results, f"{run}, accuracy (%){draws}"))


def report(runs: tuple[Path, ...], out: Path) -> None:
    """Writes tables and pictures of evaluated runs, grouped by method."""
    files = write_report(gather(runs), out)
    make_console().print("\n".join(map(str, files)), highlight=False, soft_wrap=True)


def demo(run: Path, seeds: int, epochs: int | None, data_dir: Path | None) -> None:
    """Runs the main job."""
    demo_module.demo(run, seeds, make_console(), epochs=epochs, data_dir=data_dir)


def _load(
    run: Path, data_dir: Path | None
) -> tuple[Config, Dataset, Task, object, object]:
    config = checkpoints.load_config(run)
    data = load(config.data, data_dir)
    task = classification(config, data)
    like = init_state(config, data, task)
    return config, data, task, *checkpoints.load_model(run, like)
