"""What studies share: a recipe as they vary it, and trainings that are remembered."""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import RunConfig
from experiments.errors import RunError
from experiments.evaluation.evaluation import evaluate_target, make_evaluation
from experiments.kinds import prepare
from experiments.recipes import RECIPES
from experiments.runs.directory import read_json, starting_from, write_text
from experiments.runs.stored_config import to_dict
from experiments.training.step import init_state, make_train_step, total_steps
from experiments.training.warm_start import initial_model


def study_parser(
    description: str, recipes: Iterable[str], default: str, seeds: Sequence[int]
) -> argparse.ArgumentParser:
    """The options that all studies have.

    Args:
      description: its first line is shown.
      recipes: names of those that it can vary.
      default: one of them.
      seeds: by default.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--recipe", default=default, choices=[*recipes])
    parser.add_argument(
        "--init-from",
        type=Path,
        help="a run whose network, data and trained weights all trainings start from",
    )
    parser.add_argument("--epochs", type=int, help="of CrAM+; by default the recipe's")
    parser.add_argument("--learning-rate", type=float, help="by default the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--out", type=Path, help="where results are stored")
    parser.add_argument("--data-dir", type=Path)
    return parser


def base_of(options: argparse.Namespace) -> RunConfig:
    """The recipe that a study varies."""
    config = RECIPES[options.recipe]
    if options.init_from:
        config = starting_from(config, options.init_from)
    rule = config.optimizer
    if options.learning_rate is not None:
        rule = dataclasses.replace(rule, learning_rate=options.learning_rate)
    return dataclasses.replace(
        config,
        optimizer=rule,
        epochs=options.epochs or config.epochs,
        evaluate_every=0,
        checkpoint_every=0,
    )


def results_of(options: argparse.Namespace, study: str) -> Path:
    """Where a study's results are; those from another start or length are apart."""
    start = f"-from-{options.init_from.name}" if options.init_from else ""
    epochs = f"-{options.epochs}-epochs" if options.epochs else ""
    rate = f"-rate{options.learning_rate}" if options.learning_rate else ""
    name = f"{options.recipe}{start}{epochs}{rate}"
    return options.out or Path("runs", study, name)


def run(config: RunConfig, data_dir: Path | None) -> dict[str, Any]:
    """Trains a network and evaluates it at every target.

    Returns:
      ``accuracy``: of every target in percent, recalibrated if it has batch norm;
      ``pruned``: the same before recalibration; ``cpu_seconds``.
    """
    start = time.process_time()
    data, task = prepare(config, data_dir)
    step = make_train_step(config, data, task)
    state = init_state(config, data, task, initial_model(config, task))
    size, steps = config.data.batch_size, total_steps(config, data)
    for batch in data.train.training_batches(size, config.seed, 0, steps):
        state, _ = step(state, batch)
    evaluation = make_evaluation(config, data, task)
    found = {
        target: evaluate_target(evaluation, state.params, state.batch_stats, target)
        for target in config.eval_targets
    }
    return {
        "accuracy": {name: result.judged for name, result in found.items()},
        "pruned": {name: result.pruned for name, result in found.items()},
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def remembered(config: RunConfig, out: Path, data_dir: Path | None) -> dict[str, float]:
    """The accuracies that `run` finds, read from their file if there is one.

    Raises:
      RunError: the file is of another configuration.
    """
    held_out = "held-out-" if config.data.validation else ""
    file = out / f"{held_out}{config.name}-seed{config.seed}.json"
    # As JSON gives it back.
    stored: Any = json.loads(json.dumps(to_dict(config)))
    if not file.exists():
        result = {"config": stored} | run(config, data_dir)
        write_text(file, json.dumps(result, indent=2) + "\n")
        row = " ".join(f"{v:.1f}" for v in result["accuracy"].values())
        print(f"{file.stem}: {row} ({result['cpu_seconds']} CPU seconds)", flush=True)
    found = read_json(file)
    if found.get("config") != stored:
        raise RunError(
            f"{file} is a result of another configuration; choose another --out"
        )
    accuracy: dict[str, float] = found["accuracy"]
    return accuracy


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation of a sample in brackets."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.1f} ({deviation:.1f})"
