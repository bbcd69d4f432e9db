"""Finds a sparsity for each layer under a budget, and measures what it gains."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Table

from cram_jax.paths import named_leaves
from experiments.allocation import (
    Database,
    Weighed,
    global_target,
    layer_seconds,
    uniform_target,
    weigh,
)
from experiments.commands.compress import store
from experiments.evaluation import Evaluation, make_evaluation
from experiments.metrics import make_console
from experiments.open_run import OpenRun, open_run
from experiments.pruning_options import PrunerOptions
from experiments.run_directory import check_free, read_json, write_text

if TYPE_CHECKING:
    from experiments.verbs.allocate import Allocate


def allocate(options: "Allocate") -> None:
    """Prints accuracy at equal budgets; stores models and sparsities."""
    console = make_console()
    say = partial(console.print, soft_wrap=True)
    ending = f"{options.measure}-{options.pruner}"
    models_of = {
        speedup: options.run / "compressed" / f"spdy{speedup:g}x-{ending}"
        for speedup in options.speedup
    }
    for out in models_of.values():
        check_free(out, overwrite=True)
    path = options.run / f"allocation-{ending}.json"
    found = _earlier(path, options)
    run = open_run(options.run, options.data_dir, say)
    pruning = PrunerOptions(layerwise=options.layerwise)
    evaluation = make_evaluation(run.config, run.data, run.task, pruning)

    def compress(target: str) -> Any:
        return evaluation.compress(run.params, target, run.batch_stats).params

    weighed = weigh(run, options.measure, compress, options.pruner)
    uniform = {
        speedup: uniform_target(weighed, options.pruner, weighed.total / speedup)
        for speedup in options.speedup
    }  # raises before hours are spent
    database = Database(
        run, weighed, compress, options.pruner, options.levels, options.examples
    )
    refit = "r" * options.pruner.startswith("r")
    for speedup in options.speedup:
        budget = weighed.total / speedup
        levels = database.allocate(budget, options.seed, options.starts)
        targets = {
            "uniform": uniform[speedup],
            "global": global_target(
                weighed, f"{refit}k", budget, run.task.filters.prunable
            ),
        }
        stitched = database.stitched(levels)
        models = {"SPDY": stitched} | {
            method: compress(target) for method, target in targets.items()
        }
        shares = database.sparsities[levels].tolist()
        found[f"{speedup:g}x"] = targets | {
            "sparsities": dict(zip(weighed.layers, shares, strict=True)),
            "methods": {
                method: _judged(evaluation, run, params)
                | {"share": _spent(run, weighed, params) / weighed.total}
                for method, params in models.items()
            },
        }
        statistics = evaluation.recalibrate(stitched, run.batch_stats)
        accuracy = found[f"{speedup:g}x"]["methods"]["SPDY"]["recalibrated"]
        out, model = models_of[speedup], (stitched, statistics)
        facts = {"target": out.name, run.task.metric: accuracy}
        store(out, options.run, run, model, facts, options.data_dir)
        write_text(path, json.dumps(found, indent=2) + "\n")
    console.print(_table(found, run))
    say(f"Sparsities in {path}, models in {options.run / 'compressed'}")


def _earlier(path: Path, options: "Allocate") -> dict[str, Any]:
    """What is stored of other speedups, by the same measure and pruner."""
    if path.exists():
        return dict(read_json(path))
    return {"measure": options.measure, "pruner": options.pruner}


def _judged(evaluation: Evaluation, run: OpenRun, params: Any) -> dict[str, float]:
    statistics = evaluation.recalibrate(params, run.batch_stats)
    return {
        "pruned": evaluation.accuracy(params, run.batch_stats),
        "recalibrated": evaluation.accuracy(params, statistics),
    }


def _spent(run: OpenRun, weighed: Weighed, params: Any) -> float:
    """What a network takes, given its zeros; seconds are measured."""
    if weighed.measure == "seconds":
        return sum(layer_seconds(run, params).values())
    kept = {
        path: _nonzero(leaf) / max(_nonzero(weighed.leaves[path]), 1)
        for path, leaf in named_leaves(params)
    }
    return weighed.spent(kept)


def _nonzero(leaf: Any) -> int:
    return int(np.count_nonzero(leaf))


def _table(found: dict[str, Any], run: OpenRun) -> Table:
    title = f"{run.task.metric} (%) at equal {found['measure'].replace('_', '-')}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("speedup", "masks", "of dense", "pruned", "recalib."):
        table.add_column(column, justify="right")
    for name, entry in found.items():
        if name in ("measure", "pruner"):
            continue
        for method, row in entry["methods"].items():
            table.add_row(
                name,
                method,
                f"{100 * row['share']:.1f} %",
                f"{row['pruned']:.1f}",
                f"{row['recalibrated']:.1f}",
            )
    return table
