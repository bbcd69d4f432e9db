"""Compresses a trained model to many targets and stores how accurate it stays."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from experiments.compression.options import PrunerOptions
from experiments.errors import ConfigError
from experiments.evaluation.evaluation import (
    check_targets,
    evaluate_target,
    has_statistics,
    make_evaluation,
)
from experiments.evaluation.open_run import open_run
from experiments.evaluation.results import (
    Results,
    add_run,
    digest,
    load_results,
    merged,
    new_results,
    save_results,
)
from experiments.evaluation.resumable import forget, resumable
from experiments.reports.display import accuracy_table
from experiments.runs.directory import load_config, move_aside, read_status
from experiments.runs.metrics import make_console, progress_bar


def evaluate(
    run: Path,
    names: tuple[str, ...],
    calibrations: int,
    out: Path | None,
    data_dir: Path | None,
    pruning: PrunerOptions,
) -> None:
    """Prints the accuracy on every target and stores it in evaluation.json."""
    out = out or run / "evaluation.json"
    if out.suffix != ".json":
        raise ConfigError(f"out must be a file ending in .json, got {out}")
    if out.exists():
        load_results(out)  # raises before hours are spent
    console = make_console()
    say = partial(console.print, soft_wrap=True)
    step = read_status(run).get("step")  # before the model, which may train on
    config, data, task, params, batch_stats = open_run(run, data_dir, say)
    compressed = (run / "compression.json").exists()
    names = tuple(dict.fromkeys(names))
    names = names or (("dense",) if compressed else config.eval_targets)
    check_targets(names, config, task)
    results = new_results(names, task.metric)
    evaluation = make_evaluation(config, data, task, pruning)
    unfinished = out.with_name(f"{out.stem}.part.json")
    model = digest((params, batch_stats))
    examples = digest((data.train.content, data.evaluation.content))
    depends_on = {
        "model": model,
        "data": examples,
        "calibrations": calibrations,
        "pruning": dataclasses.asdict(pruning),
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
    results["methods"][rule]["runs"][0] |= {
        "step": step,
        "data": examples,
        "settings": {n: used for n in names if (used := pruning.used_by(n))},
    }
    save_results(_with_earlier(results, out, say), out)
    forget(unfinished, depends_on, names)
    drawn = calibrations > 1 and has_statistics(batch_stats)
    draws = f", {calibrations} calibrations" if drawn else ""
    say(f"{run}:")
    console.print(accuracy_table(results, f"{task.metric} (%){draws}"))


def _with_earlier(results: Results, out: Path, say: Any) -> Results:
    """Merges results with stored ones, or moves those of something else aside."""
    if not out.exists():
        return results
    earlier = load_results(out)
    both = merged(earlier, results)
    if both is not None:
        return both
    say(f"{out} was of another model or other examples; it is now {move_aside(out)}")
    return results
