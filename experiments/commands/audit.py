"""Compares a network with its compressed versions, example by example."""

import itertools
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.table import Table

from cram_jax import audit as criteria
from experiments.batches import Examples, Source
from experiments.compression import targets
from experiments.compression.options import PrunerOptions
from experiments.errors import ConfigError
from experiments.evaluation.evaluation import check_targets, make_evaluation
from experiments.evaluation.open_run import OpenRun, open_run
from experiments.runs.directory import reading, write_text
from experiments.runs.metrics import make_console

if TYPE_CHECKING:
    from experiments.verbs.audit import Audit


class Answers(NamedTuple):
    """What a network predicts for every example of the evaluation set.

    Attributes:
      chosen: the class, (examples,).
      chances: of the classes, (examples, classes).
    """

    chosen: np.ndarray
    chances: np.ndarray


def audit(options: "Audit") -> None:
    """Prints what changed, and stores it."""
    out = options.out or options.run / "audit.json"
    console = make_console()
    say = partial(console.print, soft_wrap=True)
    run = open_run(options.run, options.data_dir, say)
    names = tuple(dict.fromkeys(options.target or run.config.eval_targets))
    names = ("dense", *(name for name in names if name != "dense"))
    check_targets(names, run.config, run.task)
    labels = _labels(run)
    groups = _groups(run, options.groups, len(labels))
    pruning = PrunerOptions(options.second_order, options.layerwise)
    evaluation = make_evaluation(run.config, run.data, run.task, pruning)
    answer = partial(_answers, run, jax.jit(run.task.predict))
    found: dict[str, Any] = {}
    # Recalibrated as the others are, or it would count as an effect of pruning.
    dense = answer(run.params, evaluation.recalibrate(run.params, run.batch_stats))
    for name in names:
        if name == "dense":
            answers = dense
        else:
            params = evaluation.compress(run.params, name, run.batch_stats).params
            statistics = evaluation.recalibrate(params, run.batch_stats)
            answers = answer(params, statistics)
        found[name] = report(answers, dense, labels, groups)
    write_text(out, json.dumps(found, indent=2) + "\n")
    for table in tables(found):
        console.print(table)
    say(f"Stored in {out}")


def report(
    answers: Answers,
    dense: Answers,
    labels: np.ndarray,
    groups: np.ndarray | None,
) -> dict[str, Any]:
    """How a compressed network differs from the dense one.

    Args:
      answers: of the compressed network.
      dense: of the dense one.
      labels: the true classes, (examples,).
      groups: the group of each example, or None.

    Returns:
      Shares from 0 to 1: ``accuracy``, ``disagreement`` with the dense network,
      ``broken``, answers that were right before, ``calibration error``, ``uncertain``,
      the mean ``auc`` of the classes, and ``by class`` and ``by group`` the accuracy.
    """
    right = answers.chosen == labels
    confidence = answers.chances.max(axis=1)
    classes = range(answers.chances.shape[1])
    areas = [criteria.auc(answers.chances[:, c], labels == c) for c in classes]
    found: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "disagreement": criteria.disagreement(answers.chosen, dense.chosen),
        "broken": float(np.mean(~right & (dense.chosen == labels))),
        "calibration error": criteria.calibration_error(confidence, right),
        "uncertain": float(np.mean(confidence < 0.9)),
        "auc": float(np.nanmean(areas)),
        "by class": _named(criteria.by_group(right, labels)),
    }
    if groups is not None:
        found["by group"] = _named(criteria.by_group(right, groups))
    return found


def _named(means: dict[Any, float]) -> dict[str, float]:
    return {str(name): mean for name, mean in means.items()}


def _answers(run: OpenRun, predict: Any, params: Any, batch_stats: Any) -> Answers:
    examples: Source = run.data.evaluation
    batches = examples.evaluation_batches(run.config.data.evaluation_batch)
    parts = [np.asarray(predict(params, batch_stats, batch)) for batch in batches]
    logits = np.concatenate(parts)[: examples.size].astype(np.float64)
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    return Answers(logits.argmax(axis=1), np.minimum(chances, 1))


def _labels(run: OpenRun) -> np.ndarray:
    """The true classes of the evaluation set."""
    examples = run.data.evaluation
    shape = jax.eval_shape(
        run.task.predict, run.params, run.batch_stats, run.data.train.take([0])
    )
    is_classifier = hasattr(shape, "shape") and shape.ndim == 2 and shape.shape[1] > 1
    if not is_classifier or not hasattr(examples, "take"):
        raise ConfigError(
            f"{run.config.name} does not sort examples into classes; audit is about "
            f"networks that do"
        )
    return np.asarray(examples.take(range(examples.size))["label"])


def _groups(run: OpenRun, file: Path | None, count: int) -> np.ndarray | None:
    """The group of each example, from a file or by the length of the texts."""
    if file is not None:
        with reading(file):
            lines = file.read_text(encoding="utf-8").splitlines()
        if len(lines) != count:
            raise ConfigError(
                f"groups must have a line for each of the {count} examples, {file} has "
                f"{len(lines)}"
            )
        return np.array([line.strip() for line in lines])
    examples = run.data.evaluation
    if not isinstance(examples, Examples) or "attention_mask" not in examples.arrays:
        return None
    lengths = examples.arrays["attention_mask"].sum(axis=1)
    quarters = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75]).astype(int))
    edges = [int(lengths.min()), *(quarters + 1).tolist(), int(lengths.max()) + 1]
    width = len(str(edges[-1]))
    words = [
        f"{low:{width}} to {high - 1:{width}} tokens"
        for low, high in itertools.pairwise(edges)
    ]
    return np.array(words)[np.searchsorted(quarters, lengths)]


def tables(found: dict[str, Any]) -> list[Table]:
    """What is printed: a row for each target, or for each of many groups."""
    whole = [name for name in found["dense"] if not name.startswith("by ")]
    parts = [name for name in found["dense"] if name.startswith("by ")]
    shown = [_table("all examples (%)", found, whole, lambda row: row)]
    for part in parts:
        groups = list(found["dense"][part])
        shown.append(
            _table(f"accuracy {part} (%)", found, groups, lambda row, p=part: row[p])
        )
    return shown


def _table(title: str, found: dict[str, Any], columns: list[str], pick: Any) -> Table:
    labels = [targets.label(name) for name in found]
    values = [[pick(row)[column] for column in columns] for row in found.values()]
    corner = "target"
    if len(columns) > max(len(labels), 10):  # many groups fit as rows only
        labels, columns, corner = columns, labels, "group"
        values = [list(row) for row in zip(*values, strict=True)]
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column(corner, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for label, row in zip(labels, values, strict=True):
        table.add_row(label, *(f"{100 * value:.1f}" for value in row))
    return table
