"""Ranges of activations for INT8, from examples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cram_jax.engine.model import Range
from cram_jax.validation import check_batches, check_choice

BINS = 2048
FINE_BINS = 16384  # 12 for each step of a fifth of the range
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

    Raises:
      ValueError: the method is unknown, the percentile out of range, or there is no
        batch.

    Example:
      >>> import numpy as np
      >>> from cram_jax import engine
      >>> network = engine.GraphBuilder()
      >>> x = network.add(engine.Input((4,)))
      >>> x = network.add(engine.Linear(np.eye(4)), x)
      >>> examples = engine.Calibration([np.ones((8, 4))], method="least_squares")
      >>> engine.compile(network.build(x), calibration=examples).int8
      True
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
        moments = _moments(calibration, observe, bounds)
        return ranges | {n: _least_squares(*bounds[n], moments[n]) for n in bounds}
    for _ in range(ZOOMS):
        counts = _histograms(calibration, observe, bounds)
        outer, bounds = bounds, {}
        for name, (low, high) in outer.items():
            inner = _percentile(calibration.percentile, low, high, counts[name])
            ranges[name] = Range.of(*inner)
            # Beside a large outlier all others fall into a few bins: look closer, while
            # float32 has numbers between.
            width, largest = inner[1] - inner[0], max(map(abs, inner))
            if (
                BINS * float(np.spacing(np.float32(largest)))
                < width
                < (high - low) / 16
            ):
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
        for name, tensor in observe(batch).items():
            if name in bounds:
                low, high = bounds[name]
                # In float32 the bins of huge or tiny numbers have no edges.
                values = tensor.astype(np.float64)
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


def _moments(
    calibration: Calibration,
    observe: Observe,
    bounds: Mapping[str, tuple[float, float]],
) -> dict[str, np.ndarray]:
    """How many values each bin has, their sum, and the sum of their squares."""
    moments = {name: np.zeros((3, FINE_BINS)) for name in bounds}
    for batch in calibration.batches:
        for name, tensor in observe(batch).items():
            if name in bounds:
                low, high = bounds[name]
                values = tensor.ravel().astype(np.float64)
                places = (values - low) * (FINE_BINS / (high - low))
                bins = np.minimum(places.astype(np.intp), FINE_BINS - 1)
                for power in range(3):
                    moments[name][power] += np.bincount(bins, values**power, FINE_BINS)
    return moments


def _least_squares(low: float, high: float, moments: np.ndarray) -> Range:
    shares = np.arange(0.2, 1.0001, 0.05)
    candidates = [
        Range.of(low * a, high * b)
        for a in (shares if low < 0 else (1.0,))
        for b in (shares if high > 0 else (1.0,))
    ]
    moments = moments[:, moments[0] > 0]
    return min(candidates, key=lambda r: _squared_error(r, *moments))


def _squared_error(
    candidate: Range, counts: np.ndarray, sums: np.ndarray, squares: np.ndarray
) -> float:
    """Of all values, as if each were rounded to where the mean of its bin goes."""
    integers = np.rint(sums / counts / candidate.scale) + candidate.zero
    restored = (np.clip(integers, 0, 255) - candidate.zero) * candidate.scale
    return float((squares + restored * (counts * restored - 2 * sums)).sum())


def as_calibration(value: Calibration | Iterable[Any] | None) -> Calibration | None:
    """A calibration, possibly made from plain batches."""
    if value is None or isinstance(value, Calibration):
        return value
    check_batches("calibration", value)
    return Calibration(list(value))
