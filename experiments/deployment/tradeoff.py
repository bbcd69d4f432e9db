"""What each target costs and gains: accuracy against time and size, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.compression import targets
from experiments.deployment.benchmark import Outcome
from experiments.deployment.engines import ENGINES
from experiments.reports.display import save_picture

ENGINES_DRAWN = (
    "cram",
    "onnxruntime",
    "onnxruntime-int8",
    "onnxruntime-dynamic",
    "openvino-int8",
    "jit",
)


class Point(NamedTuple):
    """One engine with one network.

    Attributes:
      label: printed beside the point.
      ours: whether it is our engine's.
      ms: CPU time of a call.
      megabytes: on disk.
      accuracy: in %.
    """

    label: str
    ours: bool
    ms: float
    megabytes: float
    accuracy: float


def drawn_targets(names: Sequence[str]) -> tuple[str, ...]:
    """The targets of a run that make a network faster or smaller in our engine."""
    kept = [
        name
        for name in names
        if all(
            part.form not in ("n of m", *targets.ROUNDING) and part.bits is None
            for part in targets.parse(name)
        )
    ]
    return tuple(dict.fromkeys(("dense", *kept)))


def points(outcome: Outcome, setting: tuple[int, int]) -> list[Point]:
    """Ours for every target, and the fastest of the others in INT8 and in float32.

    Args:
      outcome: of a benchmark with accuracies.
      setting: batch size and threads.
    """
    found = [
        Point(
            row.target if info.skips_zeros else f"{info.label}, dense",
            info.skips_zeros,
            row.times[setting][0].median,
            row.nbytes / 1e6,
            row.accuracy,
        )
        for row in outcome.rows
        if (info := ENGINES[row.engine]) and row.accuracy is not None
    ]
    fastest = []
    for int8 in (True, False):
        labels = {f"{i.label}, dense" for i in ENGINES.values() if i.int8 == int8}
        others = [p for p in found if not p.ours and p.label in labels]
        if others:
            fastest.append(min(others, key=lambda p: p.ms))
    return [p for p in found if p.ours] + fastest


def pareto(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Which points no other one beats in both, the cheapest first."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i]))
    front: list[int] = []
    for i in order:
        if not front or gains[i] > gains[front[-1]]:
            front.append(i)
    return front


def plot_tradeoff(
    outcome: Outcome, setting: tuple[int, int], path: Path, title: str
) -> None:
    """Draws accuracy against time and against size, with the Pareto fronts.

    Args:
      outcome: of a benchmark with accuracies.
      setting: batch size and threads.
      path: the image, PNG by its ending.
      title: of the picture.
    """
    from matplotlib.figure import Figure  # takes seconds to import

    found = points(outcome, setting)
    batch, threads = setting
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    figure.suptitle(title)
    words = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, found, [p.ms for p in found])
    _draw(right, found, [p.megabytes for p in found])
    left.set(xlabel=f"CPU time, ms ({words})", ylabel=f"{outcome.metric} (%)")
    right.set(xlabel="size on disk, MB")
    labels = left.get_legend_handles_labels()
    figure.legend(
        *labels, frameon=False, fontsize="small", loc="outside lower center", ncols=4
    )
    figure.draw_without_rendering()  # decides where the axes lie
    _label(left, found, [p.ms for p in found])
    _label(right, found, [p.megabytes for p in found])
    save_picture(figure, path)


def _draw(axes: Any, found: Sequence[Point], costs: Sequence[float]) -> None:
    from matplotlib import ticker

    accuracies = [p.accuracy for p in found]
    front = pareto(costs, accuracies)
    axes.step(
        [costs[i] for i in front],
        [accuracies[i] for i in front],
        where="post",
        color="C0",
        alpha=0.5,
        label="Pareto front",
    )
    ours = [i for i, p in enumerate(found) if p.ours]
    axes.plot(
        [costs[i] for i in ours],
        [accuracies[i] for i in ours],
        "oC0",
        label="cram_jax INT8, zeros skipped",
    )
    for color, i in enumerate((i for i, p in enumerate(found) if not p.ours), 1):
        axes.plot(costs[i], accuracies[i], f"DC{color}", label=found[i].label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)
    axes.margins(x=0.12, y=0.12)


def _label(axes: Any, found: Sequence[Point], costs: Sequence[float]) -> None:
    """Names our points, beside all points and names."""
    from matplotlib.transforms import Bbox

    accuracies = [p.accuracy for p in found]
    front = set(pareto(costs, accuracies))
    taken = [
        Bbox.from_bounds(x - 4, y - 4, 8, 8)
        for x, y in axes.transData.transform(list(zip(costs, accuracies, strict=True)))
    ]
    for i in (i for i, p in enumerate(found) if p.ours):
        # The front runs to the right and from below.
        sides = [("right", "bottom"), ("left", "top"), ("right", "top")]
        if i not in front:
            sides[:2] = reversed(sides[:2])
        name = axes.annotate(
            found[i].label,
            (costs[i], accuracies[i]),
            (0, 0),
            textcoords="offset points",
            fontsize="x-small",
        )
        for across, upright in sides:
            name.set(horizontalalignment=across, verticalalignment=upright)
            name.xyann = (
                -4 if across == "right" else 4,
                4 if upright == "bottom" else -4,
            )
            box = name.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
