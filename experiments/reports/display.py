"""Results as tables on the console and as pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from cram_jax.writing import replacing
from experiments.compression import targets
from experiments.errors import cannot_write
from experiments.evaluation.results import Results, cell, kinds, metric, summarize

HEADERS = {"pruned": "pruned", "recalibrated": "recalib."}


def accuracy_table(results: Results, title: str) -> Table:
    """One row per target; every method as pruned and, with batch norm, recalibrated."""
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
        row: list[str | Text] = [targets.label(target)]
        for method in methods:
            for kind in before:
                row.append(cell(results, method, kind, target).replace(" ", ""))
            text = cell(results, method, last, target).replace(" ", "")
            wins = len(methods) > 1 and method == best[target]
            row.append(Text(text, style="bold" if wins else ""))
        table.add_row(*row)
    return table


def plot_accuracy(
    results: Results,
    path: Path,
    title: str,
    scope: targets.Scope = "global",
) -> None:
    """Draws accuracy against sparsity: a line per method, a band for the deviation.

    Args:
      results: the results; targets that are not only a sparsity are left out.
      path: the image, PNG by its ending.
      title: of the picture.
      scope: sparsity of the whole network, of every layer, of its blocks or channels.
    """
    from matplotlib.figure import Figure  # takes seconds to import

    shares = {name: targets.sparsity(name, scope) for name in results["targets"]}
    known = {name: share for name, share in shares.items() if share is not None}
    names = sorted(known, key=lambda name: known[name])
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
    removed = "channels removed" if scope == "channels" else "weights set to zero"
    axes.set(xlabel=f"{removed} (%)", ylabel=f"{metric(results)} (%)", title=title)
    axes.set_xticks(sparsities)
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", loc="lower left")
    save_picture(figure, path)


def save_picture(figure: Any, path: Path) -> None:
    """Writes a figure of matplotlib; an earlier picture stays until it is complete.

    Raises:
      RunError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            figure.savefig(beside, dpi=150)
    except OSError as error:
        raise cannot_write(path, error) from error


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
) -> list[str]:
    """The lines of a table; columns after the first ``left`` hold numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    lines = [
        [cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows)
    ]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _best(results: Results, target: str) -> str:
    def mean(method: str) -> float:
        value, _ = summarize(results, method, kinds(results)[-1], target)
        return -math.inf if math.isnan(value) else value

    return max(results["methods"], key=mean)
