"""Ranges of activations for INT8, from examples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cram_jax.engine.model import Range
from cram_jax.validation import check_choice

BINS = 2048


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
    if calibration.method == "minmax":
        return {name: Range.of(*both) for name, both in bounds.items()}
    counts = {name: np.zeros(BINS, np.int64) for name in bounds}
    for batch in calibration.batches:
        for name, values in observe(batch).items():
            low, high = bounds[name]
            if high > low:
                counts[name] += np.histogram(values, BINS, (low, high))[0]
    return {name: _clipped(calibration, *bounds[name], counts[name]) for name in bounds}


def _clipped(
    calibration: Calibration, low: float, high: float, counts: np.ndarray
) -> Range:
    if high <= low:
        return Range.of(low, high)
    edges = np.linspace(low, high, BINS + 1)
    if calibration.method == "percentile":
        tail = (100 - calibration.percentile) / 100 * counts.sum()
        cumulative = np.cumsum(counts)
        first = int(np.searchsorted(cumulative, tail, "right"))
        last = int(np.searchsorted(cumulative, counts.sum() - tail))
        return Range.of(edges[min(first, BINS - 1)], edges[min(last + 1, BINS)])
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
