"""Batches of arrays in memory, and the order in which a run sees them."""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.errors import ConfigError

Arrays = Mapping[str, np.ndarray]  # with a common leading axis, one row an example
Batch = dict[str, Any]  # arrays of numpy, or of jax over a mesh


class Examples(NamedTuple):
    """Examples in memory.

    Attributes:
      arrays: with a common leading axis, one row an example.
    """

    arrays: Arrays

    @property
    def size(self) -> int:
        """How many they are."""
        return _count(self.arrays)

    def take(self, chosen: Sequence[int]) -> Batch:
        """Some of them."""
        rows = np.asarray(chosen)
        return {name: array[rows] for name, array in self.arrays.items()}


def training_batches(
    arrays: Arrays,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    rows: Callable[[np.ndarray, np.ndarray], Any] = operator.getitem,
) -> Iterator[Batch]:
    """The batches of the steps from ``start`` up to ``stop``.

    Every epoch has its own order, a function of the seed and its number alone, so a
    run that is resumed at ``start`` sees what an uninterrupted one sees. The last
    partial batch of an epoch is left out.

    Args:
      arrays: the examples.
      batch_size: examples in a batch.
      seed: of the run.
      start: first step, counted from 0.
      stop: the step after the last.
      rows: ``(array, chosen) -> rows of it``; with a mesh, those of this process.

    Yields:
      The arrays' names with rows of them, with a leading axis of ``batch_size``.

    Raises:
      ConfigError: there are fewer examples than a batch has.
    """
    count = _count(arrays)
    steps = count // batch_size
    if not steps:
        raise ConfigError(f"batch_size={batch_size} is more than the {count} examples")
    for step in range(start, stop):
        epoch, position = divmod(step, steps)
        if position == 0 or step == start:
            order = epoch_order(count, seed, epoch)
        chosen = order[position * batch_size : (position + 1) * batch_size]
        yield {name: rows(array, chosen) for name, array in arrays.items()}


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch of a run sees the examples."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order.flags.writeable = False
    return order


def evaluation_batches(arrays: Arrays, batch_size: int) -> Iterator[Batch]:
    """Every example once, in order; the last batch is filled up with weight 0.

    Yields:
      The arrays' names with rows of them, and ``weight`` (float32; 1 for an example, 0
      for filling), with a leading axis of ``batch_size``, so that one compilation
      serves all.
    """
    weighted = {**arrays, "weight": np.ones(_count(arrays), np.float32)}
    for begin in range(0, len(weighted["weight"]), batch_size):
        batch = {name: a[begin : begin + batch_size] for name, a in weighted.items()}
        fill = batch_size - len(batch["weight"])
        yield {
            name: np.pad(array, [(0, fill)] + [(0, 0)] * (array.ndim - 1))
            for name, array in batch.items()
        }


def _count(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))
