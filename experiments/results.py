"""Tables and plots from stored results, and how results are stored."""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from experiments import targets
from experiments.config import RunConfig
from experiments.evaluation import Accuracy
from experiments.run_directory import write_text
from experiments.stored_config import to_dict

Results = dict[str, Any]
"""What ``results.json`` holds; `new_results` and `add_run` say what that is."""

HEADERS = {"pruned": "pruned", "recalibrated": "recalib."}

PACKAGES = ("cram-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def new_results(names: Sequence[str], metric: str = "accuracy") -> Results:
    """Results without runs: the metric, the targets, the versions and the machine."""
    return {
        "metric": metric,
        "targets": list(names),
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
        },
        "seconds": 0.0,
        "methods": {},
    }


def add_run(
    results: Results,
    method: str,
    config: RunConfig,
    accuracies: Sequence[Accuracy],
    seconds: float,
) -> None:
    """Adds one run: its configuration, its accuracies (per cent) and its time."""
    recalibrated = [a for a in accuracies if a.recalibrated is not None]
    entry = results["methods"].setdefault(method, {"runs": []})
    entry["runs"].append(
        {
            "seed": config.seed,
            "seconds": round(seconds, 2),
            "pruned": {a.target: a.pruned for a in accuracies},
            "recalibrated": {a.target: a.recalibrated for a in recalibrated},
            "draws": {a.target: list(a.draws) for a in accuracies if a.draws},
            "metrics": {a.target: dict(a.metrics) for a in accuracies if a.metrics},
            "config": to_dict(config),
        }
    )


def save_results(results: Results, path: Path) -> None:
    """Writes the results as JSON."""
    write_text(path, json.dumps(results, indent=2) + "\n")


def load_results(path: Path) -> Results:
    """Reads what `save_results` wrote."""
    return json.loads(path.read_text())


def metric(results: Results) -> str:
    """What the results measure; earlier ones do not say that it is accuracy."""
    return results.get("metric", "accuracy")


def kinds(results: Results) -> tuple[str, ...]:
    """``pruned``, and ``recalibrated`` where a network has batch norm; see `Accuracy`.

    The last one is what a user of the compressed model gets.
    """
    runs = [run for entry in results["methods"].values() for run in entry["runs"]]
    has_statistics = any(run["recalibrated"] for run in runs)
    return ("pruned", "recalibrated") if has_statistics else ("pruned",)


def summarize(
    results: Results, method: str, kind: str, target: str
) -> tuple[float, float]:
    """Mean and standard deviation over the runs of a method.

    Args:
      results: the results.
      method: its name in the results.
      kind: ``pruned`` or ``recalibrated``.
      target: a target.

    Returns:
      Mean and sample standard deviation, in per cent. The deviation is that over the
      draws of calibration images where there is one run, and 0 where it has one draw;
      both are NaN where no run has the target.
    """
    values = _values(results, method, kind, target)
    if not values:
        return math.nan, math.nan
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(spread)


def cell(results: Results, method: str, kind: str, target: str) -> str:
    """Mean and standard deviation as text: ``98.2 ± 0.3``; empty where unknown."""
    mean, spread = summarize(results, method, kind, target)
    count = len(_values(results, method, kind, target))
    if not count:
        return ""
    return f"{mean:.1f} ± {spread:.1f}" if count > 1 else f"{mean:.1f}"


def accuracy_table(results: Results, title: str) -> Table:
    """One row a target; every method as pruned and, with batch norm, recalibrated."""
    methods = list(results["methods"])
    best = {target: _best(results, target) for target in results["targets"]}
    *before, last = kinds(results)
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("target", no_wrap=True)
    for method in methods:
        for kind in before:
            table.add_column(f"{method}\n{HEADERS[kind]}", justify="right", style="dim")
        table.add_column(f"{method}\n{HEADERS[last]}", justify="right")
    for target in results["targets"]:
        row = [targets.label(target)]
        for method in methods:
            for kind in before:
                row.append(cell(results, method, kind, target).replace(" ", ""))
            text = cell(results, method, last, target).replace(" ", "")
            wins = len(methods) > 1 and method == best[target]
            row.append(f"[bold]{text}[/]" if wins else text)
        table.add_row(*row)
    return table


def plot_accuracy(
    results: Results,
    path: Path,
    title: str,
    scope: Literal["global", "layer"] = "global",
) -> None:
    """Draws accuracy against sparsity: a line a method, a band for the deviation.

    Args:
      results: the results; targets that are not sparsity alone are left out.
      path: the image, PNG by its ending.
      title: of the picture.
      scope: sparsity of the whole network, or of every layer.
    """
    shares = {name: targets.sparsity(name, scope) for name in results["targets"]}
    known = {name: share for name, share in shares.items() if share is not None}
    names = sorted(known, key=known.get)
    sparsities = [100 * known[name] for name in names]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    last = kinds(results)[-1]
    for index, method in enumerate(results["methods"]):
        for kind in reversed(kinds(results)):
            mean, spread = np.transpose(
                [summarize(results, method, kind, name) for name in names]
            )
            after = kind == last
            axes.plot(
                sparsities,
                mean,
                "-o" if after else ":",
                color=f"C{index}",
                alpha=1.0 if after else 0.6,
                label=method if after else f"{method}, no recalibration",
            )
            if after:
                low, high = mean - spread, np.minimum(mean + spread, 100)
                axes.fill_between(
                    sparsities, low, high, color=f"C{index}", alpha=0.15, linewidth=0
                )
    axes.set(
        xlabel="weights set to zero (%)", ylabel=f"{metric(results)} (%)", title=title
    )
    axes.set_xticks(sparsities)
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _values(results: Results, method: str, kind: str, target: str) -> list[float]:
    runs = [run for run in results["methods"][method]["runs"] if target in run[kind]]
    if len(runs) == 1 and kind == "recalibrated":
        draws = runs[0].get("draws", {}).get(target)
        if draws:
            return draws
    return [run[kind][target] for run in runs]


def _best(results: Mapping[str, Any], target: str) -> str:
    def mean(method: str) -> float:
        value, _ = summarize(results, method, kinds(results)[-1], target)
        return -math.inf if math.isnan(value) else value

    return max(results["methods"], key=mean)


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
