"""Ranges of activations for INT8, from examples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cram_jax.engine.model import Range
from cram_jax.validation import check_choice

BINS = 2048
ZOOMS = 3  # histograms within the last one's bins, so 2048**3 in all


@dataclass(frozen=True)
class Calibration:
    """Examples that say which numbers a byte has to hold.

    Attributes:
      batches: inputs in the form that the engine is called with: an array, or a tuple
        of arrays.
      method: "minmax", from the smallest to the largest number seen; "percentile",
        without outliers; "least_squares", the range whose rounding and clipping have
        the smallest squared error.
      percentile: the share that "percentile" keeps, in %.
    """

    batches: Sequence[Any]
    method: str = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        check_choice("method", self.method, ("minmax", "percentile", "least_squares"))
        if not 50 < self.percentile <= 100:
            raise ValueError(
                f"percentile must be above 50 and at most 100, got {self.percentile}"
            )
        if not len(self.batches):
            raise ValueError("batches must not be empty")


Observe = Callable[[Any], Mapping[str, np.ndarray]]
"""From a batch to all tensors, by name."""


def find_ranges(calibration: Calibration, observe: Observe) -> dict[str, Range]:
    """The range of every tensor that `observe` returns."""
    bounds: dict[str, tuple[float, float]] = {}
    for batch in calibration.batches:
        for name, values in observe(batch).items():
            low, high = float(values.min()), float(values.max())
            if not np.isfinite((low, high)).all():
                raise ValueError(f"calibration: node {name!r} is not finite")
            before = bounds.get(name, (0.0, 0.0))
            bounds[name] = min(before[0], low), max(before[1], high)
    ranges = {name: Range.of(*both) for name, both in bounds.items()}
    if calibration.method == "minmax":
        return ranges
    bounds = {name: both for name, both in bounds.items() if both[0] < both[1]}
    if calibration.method == "least_squares":
        counts = _histograms(calibration, observe, bounds)
        return ranges | {n: _least_squares(*bounds[n], counts[n]) for n in bounds}
    for _ in range(ZOOMS):
        counts = _histograms(calibration, observe, bounds)
        outer, bounds = bounds, {}
        for name, (low, high) in outer.items():
            inner = _percentile(calibration.percentile, low, high, counts[name])
            ranges[name] = Range.of(*inner)
            # Beside a large outlier all others fall into a few bins: look closer.
            if inner[1] - inner[0] < (high - low) / 16:
                bounds[name] = inner
        if not bounds:
            break
    return ranges


def _histograms(
    calibration: Calibration,
    observe: Observe,
    bounds: Mapping[str, tuple[float, float]],
) -> dict[str, np.ndarray]:
    """How many values lie below the bounds, in each bin between them, and above."""
    counts = {name: np.zeros(BINS + 2, np.int64) for name in bounds}
    for batch in calibration.batches:
        for name, values in observe(batch).items():
            if name in bounds:
                low, high = bounds[name]
                counts[name][1:-1] += np.histogram(values, BINS, (low, high))[0]
                counts[name][0] += np.count_nonzero(values < low)
                counts[name][-1] += np.count_nonzero(values > high)
    return counts


def _percentile(
    percentile: float, low: float, high: float, counts: np.ndarray
) -> tuple[float, float]:
    """The bounds without so many of the smallest and of the largest values."""
    edges = np.linspace(low, high, BINS + 1)
    tail = (100 - percentile) / 100 * counts.sum()
    cumulative = np.cumsum(counts)[:-1]  # up to each edge
    first = int(np.searchsorted(cumulative, tail, "right")) - 1
    last = int(np.searchsorted(cumulative, counts.sum() - tail))
    return float(edges[max(first, 0)]), float(edges[min(last, BINS)])


def _least_squares(low: float, high: float, counts: np.ndarray) -> Range:
    edges = np.linspace(low, high, BINS + 1)
    counts = counts[1:-1]
    middles = (edges[1:] + edges[:-1]) / 2
    shares = np.arange(0.2, 1.0001, 0.05)
    candidates = [
        Range.of(low * a, high * b)
        for a in (shares if low < 0 else (1.0,))
        for b in (shares if high > 0 else (1.0,))
    ]
    return min(candidates, key=lambda r: _squared_error(r, middles, counts))


def _squared_error(candidate: Range, values: np.ndarray, counts: np.ndarray) -> float:
    integers = np.rint(values / candidate.scale) + candidate.zero
    restored = (np.clip(integers, 0, 255) - candidate.zero) * candidate.scale
    # A bin as wide as the step hides the rounding error within it, so add it.
    rounding = candidate.scale**2 / 12
    return float((counts * ((restored - values) ** 2 + rounding)).sum())


def as_calibration(value: Calibration | Iterable[Any] | None) -> Calibration | None:
    """A calibration, possibly made from plain batches."""
    if value is None or isinstance(value, Calibration):
        return value
    if isinstance(value, np.ndarray):
        raise TypeError(
            "calibration must be a Calibration or a list of batches, got an array; "
            "put it into a list"
        )
    return Calibration(list(value))
