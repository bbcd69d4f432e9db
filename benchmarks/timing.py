"""Interleaved timing in one process: medians, spreads and ratios."""

import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np


def machine() -> str:
    """The machine and the versions, for the head of every result."""
    names = ("jax", "jaxlib", "numpy", "optax", "flax", "torch")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    device = jax.devices()[0]
    return (
        f"{jax.device_count()} x {device.device_kind} ({device.platform}), "
        f"{platform.processor() or platform.machine()}, "
        f"{len(_cores())} cores, Python {platform.python_version()}\n"
        f"{', '.join(versions)}"
    )


def _cores() -> list[int]:
    import os

    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, np.ndarray]:
    """Times functions in turn, so that a slow moment of the machine affects all.

    Args:
      functions: by name; each returns what has to be ready when its time stops.
      repeats: timed rounds, after one that is not.

    Returns:
      Seconds of every round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def row(name: str, seconds: np.ndarray, ours: np.ndarray) -> str:
    """A line: median, spread, and how many times ours it takes, round by round."""
    return (
        f"{name:32s} {np.median(seconds):9.4f} s "
        f"({seconds.min():.4f} to {seconds.max():.4f}) "
        f"{np.median(seconds / ours):8.2f} x"
    )
