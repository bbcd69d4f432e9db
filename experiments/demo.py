"""The main job: one dense model, many compressed ones, against SGD and SAM."""

import dataclasses
import importlib.util
import time
from pathlib import Path

from rich.console import Console

from experiments.datasets import data_dir_note
from experiments.errors import ConfigError, command_line
from experiments.evaluation.evaluation import (
    Evaluation,
    evaluate_target,
    make_evaluation,
)
from experiments.evaluation.results import (
    Results,
    add_run,
    cell,
    new_results,
    save_results,
)
from experiments.images.config import ImageConfig
from experiments.images.data import Dataset, load
from experiments.images.task import classification
from experiments.recipes import digits
from experiments.reports.display import accuracy_table, plot_accuracy
from experiments.runs.metrics import progress_bar
from experiments.task import Task
from experiments.training.loop import train
from experiments.training.step import make_train_step


def demo(
    run: Path,
    seeds: int,
    console: Console,
    *,
    epochs: int | None = None,
    data_dir: Path | None = None,
) -> Results:
    """Trains every method, prunes each in one shot, prints a table, draws a picture.

    Args:
      run: a directory for ``results.json``, ``accuracy_vs_sparsity.png`` and a run
        directory for every model; an earlier demo in it is overwritten.
      seeds: runs of every method. Equal seeds mean equal initial weights.
      console: where to write.
      epochs: of CrAM+ and SAM; SGD, whose steps cost half, trains twice as long.
      data_dir: where the prepared data are kept.

    Returns:
      The results, as stored.
    """
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}")
    begin = time.perf_counter()
    methods = digits.methods(epochs)
    config = methods["CrAM+"]
    data = load(config.data, data_dir)
    task = classification(config, data)
    evaluation = make_evaluation(config, data, task)
    results = new_results(config.eval_targets)
    _introduce(console, methods, seeds, data.train.size)

    with progress_bar(console) as progress:
        models = progress.add_task("models", total=len(methods) * seeds, note="")
        for method, method_config in methods.items():
            train_step = make_train_step(method_config, data, task)
            for seed in range(seeds):
                start = time.perf_counter()
                this = dataclasses.replace(method_config, seed=seed)
                state = train(
                    this,
                    run / f"{this.name}-seed{seed}",
                    data,
                    task,
                    progress,
                    train_step=train_step,
                    overwrite=True,
                    notes=data_dir_note(data_dir),
                )
                model = state.judged, state.batch_stats
                accuracies = [
                    evaluate_target(evaluation, *model, target)
                    for target in config.eval_targets
                ]
                seconds = time.perf_counter() - start
                add_run(results, method, this, accuracies, seconds)
                progress.update(models, advance=1)
                dense, *_ = accuracies
                console.print(
                    f"{method:>5}, seed {seed}: dense {dense.pruned:.1f} %, "
                    f"{seconds:.1f} s"
                )

    results["seconds"] = round(time.perf_counter() - begin, 1)
    save_results(results, run / "results.json")
    title = f"Digits, one-shot pruning, test accuracy (%), {seeds} seeds"
    plot_accuracy(results, run / "accuracy_vs_sparsity.png", title)
    console.print()
    console.print(accuracy_table(results, title))
    if importlib.util.find_spec("llvmlite") is None:
        console.print("No picture of the speed: pip install 'cram_jax[engine]'")
    else:
        _show_speed(run, console, data, task, evaluation, epochs, data_dir)
    seconds = time.perf_counter() - begin
    _conclude(console, results, run, config, seconds)
    return results


def _show_speed(
    run: Path,
    console: Console,
    data: Dataset,
    task: Task,
    evaluation: Evaluation,
    epochs: int | None,
    data_dir: Path | None,
) -> None:
    """Trains one model for blocks, and draws what its targets cost and gain."""
    # Slow to import, and needed only here.
    from experiments.commands.benchmark import draw_tradeoff
    from experiments.deployment.benchmark import Conduct
    from experiments.deployment.subjects import subject_of_model
    from experiments.deployment.tradeoff import ENGINES_DRAWN, drawn_targets

    config = digits.methods(epochs)["CrAM+"]
    config = dataclasses.replace(
        config,
        name=digits.blocks.name,
        optimizer=digits.blocks.optimizer,
        eval_targets=digits.blocks.eval_targets,
    )
    console.print(
        "\nZeros save time only if an engine skips them: one more model, CrAM+ for "
        "blocks of 4 inputs x 2 outputs.",
        soft_wrap=True,
    )
    with progress_bar(console) as progress:
        state = train(
            config,
            run / f"{config.name}-seed0",
            data,
            task,
            progress,
            overwrite=True,
            notes=data_dir_note(data_dir),
        )
    subject = subject_of_model(
        config.name, config, data, evaluation, state.judged, state.batch_stats
    )
    names = drawn_targets(config.eval_targets)
    conduct = Conduct(engines=ENGINES_DRAWN, targets=names)
    draw_tradeoff(subject, conduct, run / "tradeoff.png", console)


def _introduce(
    console: Console, methods: dict[str, ImageConfig], seeds: int, images: int
) -> None:
    console.print(
        f"Training {', '.join(methods)} on {images:,} handwritten digits, "
        f"{seeds} seeds each; then one-shot compression, no retraining.",
        soft_wrap=True,
    )
    for method, config in methods.items():
        optimizer = config.optimizer
        words = [
            f"{config.epochs} epochs",
            f"learning rate {optimizer.learning_rate}",
            f"weight decay {optimizer.weight_decay}",
        ]
        if optimizer.rule != "none":
            words.append(f"rho {optimizer.rho}")
        if optimizer.rule == "cram_plus":
            words.append(f"targets {' '.join(optimizer.train_targets)}")
        console.print(f"{method:>5}: {', '.join(words)}", highlight=False)


def _conclude(
    console: Console,
    results: Results,
    run: Path,
    config: ImageConfig,
    seconds: float,
) -> None:
    def compare(target: str, kind: str = "recalibrated") -> str:
        return ", ".join(
            f"{method} {cell(results, method, kind, target)}"
            for method in results["methods"]
        )

    model, speed = run / f"{config.name}-seed0", run / "tradeoff.png"
    lines = (
        f"Whole run: {seconds:.0f} s on {results['machine']['cpus']} "
        f"{results['machine']['backend'].upper()} cores. Compare:",
        f"  dense        {compare('dense', 'pruned')}",
        f"  90 % zeros   {compare('k90')}",
        f"  95 % zeros   {compare('k95')}",
        "  and the two columns of each method: compression changes the statistics of "
        "batch norm;",
        "  recalibrating on 1,000 training images, without labels, corrects them.",
        f"The picture: {run / 'accuracy_vs_sparsity.png'}   "
        f"every number: {run / 'results.json'}",
        *([f"Accuracy against speed and size: {speed}"] if speed.exists() else []),
        "Try next:",
        f"  {command_line('compress', model, '--target', 'k90')}",
        f"  {command_line('evaluate', model, '--target', 'k97', 'k90+4bit')}",
        "  python -m experiments train digits --optimizer.rule topk_plus",
        "SGD* is SGD with its weight decay tuned for pruning, on held-out images: "
        "experiments/recipes/digits.py",
    )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
