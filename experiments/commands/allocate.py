"""Finds a sparsity for each layer under a budget, and measures what it gains."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Table

from cram_jax.paths import named_leaves
from experiments.commands.compress import store
from experiments.compression.options import PrunerOptions
from experiments.errors import ConfigError
from experiments.evaluation.allocation import (
    Database,
    Weighed,
    global_target,
    layer_seconds,
    uniform_target,
    weigh,
)
from experiments.evaluation.evaluation import Evaluation, make_evaluation
from experiments.evaluation.open_run import OpenRun, open_run
from experiments.evaluation.results import digest
from experiments.runs.directory import move_aside, read_json, write_text
from experiments.runs.metrics import make_console

if TYPE_CHECKING:
    from experiments.verbs.allocate import Allocate


SETTINGS = (
    *("measure", "pruner", "levels", "starts", "examples", "seed"),
    *("layerwise", "model"),
)
"""What results must share to stand in one table."""


def allocate(options: "Allocate") -> None:
    """Prints accuracy at equal budgets; stores models and sparsities."""
    console = make_console()
    say = partial(console.print, soft_wrap=True)
    ending = f"{options.measure}-{options.pruner}"
    models_of = {
        speedup: options.run / "compressed" / f"spdy{speedup:g}x-{ending}"
        for speedup in options.speedup
    }
    path = options.run / f"allocation-{ending}.json"
    run = open_run(options.run, options.data_dir, say)
    found = _earlier(path, _settings(options, run))
    for speedup, out in list(models_of.items()):
        if f"{speedup:g}x" in found and out.exists():
            say(f"{speedup:g}x was found before")
            del models_of[speedup]
    if models_of:
        _find(models_of, options, run, found, path, say)
    console.print(_table(found, run))
    say(f"Sparsities in {path}, models in {options.run / 'compressed'}")


def _find(
    models_of: dict[float, Path],
    options: "Allocate",
    run: OpenRun,
    found: dict[str, Any],
    path: Path,
    say: Callable[[str], None],
) -> None:
    """Searches for speedups; stores each in ``found``, in its file and as a model.

    ``found`` holds the settings, too.
    """
    pruning = PrunerOptions(layerwise=options.layerwise)
    evaluation = make_evaluation(run.config, run.data, run.task, pruning)

    def compress(target: str) -> Any:
        return evaluation.compress(run.params, target, run.batch_stats).params

    settings = {name: found[name] for name in SETTINGS}
    weighed = weigh(run, options.measure, compress, options.pruner)
    _check_dense(options.run, weighed)
    refit = "r" * options.pruner.startswith("r")
    budgets = {speedup: weighed.total / speedup for speedup in models_of}
    targets_of = {
        speedup: {
            "uniform": uniform_target(weighed, options.pruner, budget),
            "global": global_target(
                weighed, f"{refit}k", budget, run.task.filters.prunable
            ),
        }
        for speedup, budget in budgets.items()
    }  # raises before hours are spent
    _set_aside(path, options, settings, found, say)
    database = Database(
        run, weighed, compress, options.pruner, options.levels, options.examples
    )
    for speedup, out in models_of.items():
        levels = database.allocate(budgets[speedup], options.seed, options.starts)
        targets = targets_of[speedup]
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
        facts = {"target": out.name, run.task.metric: accuracy}
        facts |= {"settings": settings}
        model = stitched, statistics
        store(out, options.run, run, model, facts, options.data_dir)
        write_text(path, json.dumps(found, indent=2) + "\n")


def _settings(options: "Allocate", run: OpenRun) -> dict[str, Any]:
    """See `SETTINGS`."""
    return {
        **{name: getattr(options, name) for name in SETTINGS[:-2]},
        "layerwise": dataclasses.asdict(options.layerwise),
        "model": digest((run.params, run.batch_stats)),
    }


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is stored of other speedups; only the settings if those were others."""
    stored = dict(read_json(path)) if path.exists() else {}
    return dict(settings) if _changed(stored, settings) else stored


def _changed(stored: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    return [name for name in settings if stored.get(name) != settings[name]]


def _set_aside(
    path: Path,
    options: "Allocate",
    settings: dict[str, Any],
    found: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Renames what other settings have left: the sparsities and every model."""
    if path.exists() and (changed := _changed(read_json(path), settings)):
        say(f"{path} was of another {', '.join(changed)}; it is now {move_aside(path)}")
    ending = f"x-{options.measure}-{options.pruner}"
    for model in sorted((options.run / "compressed").glob(f"spdy*{ending}")):
        if f"{model.name.removeprefix('spdy').removesuffix(ending)}x" not in found:
            say(f"{model} is of an earlier search; it is now {move_aside(model)}")


def _check_dense(run: Path, weighed: Weighed) -> None:
    """Raises if layers have zeros, which would count as paid for."""
    for path in weighed.layers:
        zeros = 1 - np.count_nonzero(weighed.leaves[path]) / weighed.leaves[path].size
        if zeros > 0.05:
            raise ConfigError(
                f"path must be a dense run, got {run}, where {100 * zeros:.0f} % of "
                f"{path} are zero already; name the run that it was pruned from"
            )


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
    # Biases may begin at zero; a global mask also prunes layers that others leave.
    kept = {
        path: int(np.count_nonzero(leaf)) / max(int(np.count_nonzero(before)), 1)
        for (path, leaf), before in zip(
            named_leaves(params), weighed.leaves.values(), strict=True
        )
    }
    return weighed.spent(kept)


def _table(found: dict[str, Any], run: OpenRun) -> Table:
    title = f"{run.task.metric} (%) at equal {found['measure'].replace('_', '-')}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("speedup", "masks", "of dense", "pruned", "recalib."):
        table.add_column(column, justify="right")
    speedups = [name for name in found if name not in SETTINGS]
    for name in sorted(speedups, key=lambda name: float(name[:-1])):
        for method, row in found[name]["methods"].items():
            table.add_row(
                name,
                method,
                f"{100 * row['share']:.1f} %",
                f"{row['pruned']:.1f}",
                f"{row['recalibrated']:.1f}",
            )
    return table
