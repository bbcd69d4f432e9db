"""Outcomes of benchmarks on the console, as Markdown and as JSON.

``x INT8`` is how many times faster than the best other engine with the dense network in
INT8, in CPU time; ``differs`` is the largest difference from the float32 network, over
its largest output; ``exact`` is what that network scores.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from experiments.deployment.benchmark import Outcome, Row
from experiments.deployment.engines import ENGINES
from experiments.reports.display import markdown_table
from experiments.runs.directory import write_text


def console_table(outcome: Outcome, batch: int, threads: int) -> Table:
    """One row for each engine and network, for a batch size and a number of threads."""
    title = f"{outcome.name}, batch {batch}, {threads} thread{'s' * (threads > 1)}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    header, rows = _cells(outcome, batch, threads)
    for index, name in enumerate(header):
        numbers = index > 1
        table.add_column(
            name, justify="right" if numbers else "left", no_wrap=not numbers
        )
    for row in rows:
        table.add_row(*row)
    return table


def write_outcomes(
    outcomes: Sequence[Outcome], path: Path, about: dict[str, Any]
) -> list[Path]:
    """Writes the numbers as JSON, and the tables as Markdown beside it.

    Args:
      outcomes: of all subjects.
      path: of the JSON.
      about: machine, versions and settings.

    Returns:
      The two files.
    """
    values = about | {"networks": [as_dict(outcome) for outcome in outcomes]}
    write_text(path, json.dumps(values, indent=2) + "\n")
    markdown = path.with_suffix(".md")
    write_text(markdown, "\n".join(_markdown(outcomes, about)))
    return [path, markdown]


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """For JSON."""
    return {
        "name": outcome.name,
        "metric": outcome.metric,
        "float32": outcome.exact,
        "rows": [
            {
                "engine": row.engine,
                "target": row.target,
                "bytes": row.nbytes,
                "largest_difference": row.difference,
                outcome.metric: row.accuracy,
                "times": [
                    {
                        "batch": batch,
                        "threads": threads,
                        "cpu_ms": cpu.as_dict(),
                        "wall_ms": wall.as_dict(),
                    }
                    for (batch, threads), (cpu, wall) in row.times.items()
                ],
            }
            for row in outcome.rows
        ],
    }


def best_dense_int8(rows: Sequence[Row], setting: tuple[int, int]) -> float | None:
    """CPU milliseconds of the fastest engine but ours, dense in INT8."""
    times = [
        row.times[setting][0].median
        for row in rows
        if ENGINES[row.engine].int8 and not ENGINES[row.engine].skips_zeros
    ]
    return min(times, default=None)


def _cells(
    outcome: Outcome, batch: int, threads: int
) -> tuple[list[str], list[list[str]]]:
    judged = any(row.accuracy is not None for row in outcome.rows)
    header = ["engine", "network", "CPU ms", "least", "most", "wall ms"]
    header += ["x INT8", "MB", "differs"]
    header += [f"{outcome.metric} %", "exact %"] if judged else []
    dense = best_dense_int8(outcome.rows, (batch, threads))
    rows = []
    for row in outcome.rows:
        cpu, wall = row.times[batch, threads]
        cells = [row.engine, row.target]
        cells += [f"{ms:.3f}" for ms in (cpu.median, cpu.least, cpu.most, wall.median)]
        cells += ["" if dense is None else f"{dense / cpu.median:.2f}"]
        cells += [f"{row.nbytes / 1e6:.3f}", f"{row.difference:.1e}"]
        if judged:
            exact = outcome.exact[row.target]
            cells += [
                "" if value is None else f"{value:.2f}"
                for value in (row.accuracy, exact)
            ]
        rows.append(cells)
    return header, rows


def _markdown(outcomes: Sequence[Outcome], about: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {value}  " for name, value in about.items()]
    for outcome in outcomes:
        for batch, threads in outcome.rows[0].times if outcome.rows else ():
            header, rows = _cells(outcome, batch, threads)
            lines += ["", f"## {outcome.name}, batch {batch}, threads {threads}", ""]
            lines += markdown_table(header, rows, left=2)
    return [*lines, ""]
