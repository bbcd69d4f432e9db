"""A comparison of methods as a table, a page and a picture."""

from pathlib import Path

from rich import box
from rich.table import Table

from experiments.compression import targets
from experiments.evaluation.results import Results, cell, kinds, summarize
from experiments.methods.bench import METHODS
from experiments.reports.display import markdown_table, save_picture
from experiments.runs.directory import write_text

COSTS = ("networks", "gradients", "state", "MiB", "CPU s", "knob")
"""One for each target or one for all; evaluations a step; the optimiser's state in
copies of the parameters; memory of a step; of a training; the value that was chosen."""


def rows(results: Results) -> list[list[str]]:
    """One row for each method: accuracy on every target, then what it costs."""
    last = kinds(results)[-1]
    found = []
    for method, own in results["methods"].items():
        if not own["runs"]:
            continue
        entry, cost = METHODS[method], own["cost"]
        seconds = sum(run["seconds"] for run in own["runs"]) / len(own["runs"])
        found.append(
            [
                entry.label,
                *(cell(results, method, last, target) for target in results["targets"]),
                "one each" if entry.forms else "one for all",
                f"{cost['evaluations']:g}",
                f"{cost['state']:.2f}",
                f"{cost['memory']:.0f}",
                f"{seconds:.0f}",
                f"{entry.knob.removeprefix('pruning.')} {own['runs'][-1]['knob']:g}",
            ]
        )
    return found


def table(results: Results, title: str) -> Table:
    """For the console."""
    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("method", no_wrap=True)
    for name in (*map(targets.label, results["targets"]), *COSTS):
        made.add_column(name, justify="right")
    for row in rows(results):
        made.add_row(*row)
    return made


def page(results: Results, title: str) -> str:
    """For a file: the same in Markdown, and how knobs were chosen."""
    header = ["method", *map(targets.label, results["targets"]), *COSTS]
    lines = [f"# {title}", "", *markdown_table(header, rows(results), len(header)), ""]
    bench = results["bench"]
    if bench["held_out"]:
        lines += [
            f"Knobs, by accuracy (%) on {bench['held_out']} examples held out, at "
            f"{bench['tuned_on']} where a network is trained for each target:",
            "",
        ]
    for method, own in results["methods"].items():
        tried = [f"{found['value']:g}: {found['score']:.1f}" for found in own["search"]]
        if tried:
            entry = METHODS[method]
            lines.append(f"- {entry.label}, {entry.knob}: {', '.join(tried)}")
        for run in own["diverged"]:
            target = run["trained_for"] or "all targets"
            lines.append(f"- {method} diverged for {target}, seed {run['seed']}")
    return "\n".join(lines) + "\n"


def plot(results: Results, path: Path, title: str) -> None:
    """Draws accuracy against the share of zeros over all weights, a line per method."""
    from matplotlib.figure import Figure  # takes seconds to import

    shares = {name: targets.sparsity(name) for name in results["targets"]}
    known = {name: 100 * share for name, share in shares.items() if share is not None}
    last = kinds(results)[-1]
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    styles = ("-o", "--s", ":^")
    for index, (method, own) in enumerate(results["methods"].items()):
        means = {name: summarize(results, method, last, name)[0] for name in known}
        points = sorted((known[n], m) for n, m in means.items() if m == m)
        if own["runs"] and points:
            style = styles[index // 10 % len(styles)]
            label = METHODS[method].label
            axes.plot(*zip(*points, strict=True), style, markersize=4, label=label)
    axes.set(xlabel="weights set to zero (%)", ylabel="accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="lower left")
    save_picture(figure, path)


def store(results: Results, out: Path, title: str) -> None:
    """Writes the page and the picture beside the results."""
    write_text(out / "comparison.md", page(results, title))
    plot(results, out / "comparison.png", title)
