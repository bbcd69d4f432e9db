"""What evaluations found: how it is stored, merged and summarised."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.config import RunConfig
from experiments.runs.directory import read_json, reading, write_text
from experiments.runs.stored_config import to_dict

if TYPE_CHECKING:
    from experiments.evaluation.evaluation import Accuracy

Results = dict[str, Any]
"""What ``results.json`` holds: see `new_results` and `add_run`."""

PACKAGES = ("cram-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def new_results(names: Sequence[str], metric: str = "accuracy") -> Results:
    """Results without runs: the metric, the targets, the versions and the machine."""
    import jax

    return {
        "metric": metric,
        "targets": list(names),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
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
    accuracies: "Sequence[Accuracy]",
    seconds: float,
    model: str = "",
) -> None:
    """Adds one run.

    Args:
      results: where to.
      method: its name there.
      config: the run's.
      accuracies: of every target, in per cent.
      seconds: how long it took.
      model: digest of the model, see `digest`.
    """
    recalibrated = [a for a in accuracies if a.recalibrated is not None]
    entry = results["methods"].setdefault(method, {"runs": []})
    entry["runs"].append(
        {
            "seed": config.seed,
            "model": model,
            "seconds": round(seconds, 2),
            "pruned": {a.target: a.pruned for a in accuracies},
            "recalibrated": {a.target: a.recalibrated for a in recalibrated},
            "draws": {a.target: list(a.draws) for a in accuracies if a.draws},
            "metrics": {a.target: dict(a.metrics) for a in accuracies if a.metrics},
            "config": to_dict(config),
        }
    )


def merged(stored: Results, new: Results) -> Results | None:
    """Results of one run with those of an earlier evaluation of the same.

    Args:
      stored: the earlier ones.
      new: those of one run; they win if both have a target.

    Returns:
      The merged results; None if they are of another model or on other examples.
    """
    ((method, entry),) = new["methods"].items()
    (run,) = entry["runs"]
    earlier = stored["methods"].get(method, {"runs": [{}]})["runs"]
    if len(earlier) != 1:
        return None
    (before,) = earlier
    data = run.get("data")
    if before.get("model") != run["model"] or before.get("data", data) != data:
        return None
    both = {
        kind: before.get(kind, {}) | run.get(kind, {})
        for kind in ("pruned", "recalibrated", "draws", "metrics", "settings")
    }
    seconds = round(before.get("seconds", 0.0) + run["seconds"], 2)
    return new | {
        "targets": in_order(stored["targets"], new["targets"]),
        "methods": {method: {"runs": [run | both | {"seconds": seconds}]}},
    }


def in_order(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The union; each new name follows the name it follows in the second list.

    The first ones come before the first that is known, or last if none is.
    """
    both = list(names)
    place = min((both.index(n) for n in others if n in both), default=len(both))
    for name in others:
        if name not in both:
            both.insert(place, name)
        place = both.index(name) + 1
    return both


def digest(tree: Any) -> str:
    """SHA-256 of all leaves, in hexadecimal: equal only for equal numbers."""
    import jax

    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        sha.update(np.ascontiguousarray(leaf).data)
    return sha.hexdigest()


def save_results(results: Results, path: Path, *, indent: int | None = 2) -> None:
    """Writes the results as JSON; without indentation, those of many runs are small."""
    write_text(path, json.dumps(results, indent=indent) + "\n")


def load_results(path: Path) -> Results:
    """Reads what `save_results` wrote.

    Raises:
      RunError: it cannot be read, or holds something else.
    """
    results = read_json(path)
    with reading(path):
        names = results["targets"]
        for entry in results["methods"].values():
            for run in entry["runs"]:
                for kind in ("pruned", "recalibrated"):
                    for name, value in run[kind].items():
                        float(value), names.index(name)
                run["seed"], results["versions"].items(), results["machine"].items()
    return results


def metric(results: Results) -> str:
    """What the results measure: accuracy, if they do not say."""
    return results.get("metric", "accuracy")


def kinds(results: Results) -> tuple[str, ...]:
    """``pruned``, and ``recalibrated`` if a network has batch norm; see `Accuracy`.

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
      Mean and sample standard deviation, in percent. With a single run, the deviation
      is that over its draws of calibration images, and 0 if there is one draw. Both are
      NaN if no run has the target.
    """
    values = _values(results, method, kind, target)
    if not values:
        return math.nan, math.nan
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(spread)


def cell(results: Results, method: str, kind: str, target: str) -> str:
    """Mean and standard deviation as text: ``98.2 ± 0.3``; empty if unknown.

    ``98.2 ± 0.3 (2/3)`` if only two of three seeds have the target.
    """
    mean, spread = summarize(results, method, kind, target)
    count = len(_values(results, method, kind, target))
    if not count:
        return ""
    text = f"{mean:.1f} ± {spread:.1f}" if count > 1 else f"{mean:.1f}"
    return text + missing_seeds(results, method, kind, target)


def missing_seeds(results: Results, method: str, kind: str, target: str) -> str:
    """How many seeds have a target, such as `` (2/3)``; empty if all do."""
    runs = results["methods"][method]["runs"]
    all_seeds = {run["seed"] for run in runs}
    seeds = {run["seed"] for run in runs if target in run[kind]}
    return "" if seeds == all_seeds else f" ({len(seeds)}/{len(all_seeds)})"


def _values(results: Results, method: str, kind: str, target: str) -> list[float]:
    runs = [run for run in results["methods"][method]["runs"] if target in run[kind]]
    if len(runs) == 1 and kind == "recalibrated":
        draws = runs[0].get("draws", {}).get(target)
        if draws:
            return draws
    return [run[kind][target] for run in runs]


def version(name: str) -> str:
    """Of a package, or that it is not installed."""
    if name == "cram-jax":
        import cram_jax

        # Not that of the metadata, which an old installation may have left.
        return cram_jax.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
