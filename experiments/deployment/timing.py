"""Time of several functions, in turn, in one process."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

LEAST = 2e-3
"""The least duration of a measurement: a short function runs several times."""


@dataclass(frozen=True)
class Spread:
    """Median and range of some measurements, in milliseconds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        """Of seconds."""
        ms = 1e3 * np.array(seconds)
        return cls(float(np.median(ms)), float(ms.min()), float(ms.max()))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {name: round(value, 5) for name, value in asdict(self).items()}


Times: TypeAlias = tuple[Spread, Spread]
"""CPU time of all threads, and wall time, of one call."""


Key = TypeVar("Key")


def measure(
    functions: Mapping[Key, Callable[[], Any]], rounds: int
) -> dict[Key, Times]:
    """Times functions in turn, so that a slow moment of the machine affects all.

    Args:
      functions: by name.
      rounds: how often each is measured, after two calls that do not count.

    Returns:
      CPU and wall time of a call, by name.
    """
    calls = {name: _calls(function) for name, function in functions.items()}
    seconds: dict[Key, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()  # the previous function has filled the caches with its data
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(calls[name]):
                function()
            seconds[name].append(
                (
                    (time.process_time() - cpu) / calls[name],
                    (time.perf_counter() - wall) / calls[name],
                )
            )
    return {
        name: (Spread.of([c for c, _ in pairs]), Spread.of([w for _, w in pairs]))
        for name, pairs in seconds.items()
    }


def _calls(function: Callable[[], Any]) -> int:
    """How many calls take long enough to be timed."""
    function()
    start = time.perf_counter()
    function()
    return max(1, round(LEAST / max(time.perf_counter() - start, 1e-7)))
