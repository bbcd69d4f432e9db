"""Examples, their batches, and the order in which a run sees them."""

import abc
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from experiments.errors import ConfigError

Arrays = Mapping[str, np.ndarray]  # with a common leading axis, one row an example
Batch = dict[str, Any]  # arrays of numpy, or of jax over a mesh


class Source(abc.ABC):
    """Examples to train on and to evaluate on, wherever they are stored."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """How many they are."""

    @property
    def content(self) -> Any:
        """Arrays that tell these examples from others; by default their number."""
        return np.array(self.size)

    @abc.abstractmethod
    def take(self, chosen: Sequence[int] | np.ndarray) -> Batch:
        """Some of them, as for evaluation: arrays by name, one row for each example."""

    def take_training(self, chosen: np.ndarray, seed: int, epoch: int) -> Batch:
        """Some of them, as in an epoch of a run; by default as for evaluation."""
        del seed, epoch
        return self.take(chosen)

    def made(
        self, make: Callable[[int], Batch], start: int, stop: int
    ) -> Iterator[Batch]:
        """``make(start)`` to ``make(stop - 1)``, by default one by one."""
        return map(make, range(start, stop))

    def training_batches(
        self,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        positions: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """The batches of the steps from ``start`` to ``stop``, exclusive.

        Every epoch has its own order, `epoch_order`, so a run that is resumed at
        ``start`` sees what an uninterrupted one sees. The last partial batch of an
        epoch is left out.

        Args:
          batch_size: examples in a batch.
          seed: of the run.
          start: first step, counted from 0.
          stop: the step after the last.
          positions: the rows of a batch to read; by default all.

        Returns:
          An iterator of arrays by name, one row for each position.

        Raises:
          ConfigError: there are fewer examples than a batch has.
        """
        whole_batches(self.size, batch_size)  # raises even if there are no steps
        make = partial(_training_batch, self, batch_size, seed, positions)
        return self.made(make, start, stop)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, in order; copies of the last fill up the last batch.

        Returns:
          An iterator of arrays by name, and ``weight`` (float32; 1 for an example, 0
          for filling), with a leading axis of ``batch_size``, so that one compilation
          serves all.
        """
        make = partial(_evaluation_batch, self, batch_size)
        return self.made(make, 0, -(-self.size // batch_size))


@dataclass(frozen=True, eq=False)
class Examples(Source):
    """Examples in memory.

    Attributes:
      arrays: with a common leading axis, one row an example.
    """

    arrays: Arrays

    @property
    def size(self) -> int:
        """How many they are."""
        return len(next(iter(self.arrays.values())))

    @property
    def content(self) -> Any:
        """The arrays."""
        return dict(self.arrays)

    def take(self, chosen: Sequence[int] | np.ndarray) -> Batch:
        """Some of them."""
        rows = np.asarray(chosen, np.intp)
        return {name: array[rows] for name, array in self.arrays.items()}


def _training_batch(
    source: Source, batch_size: int, seed: int, positions: np.ndarray | None, step: int
) -> Batch:
    epoch, chosen = examples_of_step(source.size, batch_size, seed, step)
    chosen = chosen if positions is None else chosen[positions]
    return source.take_training(chosen, seed, epoch)


def _evaluation_batch(source: Source, batch_size: int, number: int) -> Batch:
    places = np.arange(number * batch_size, (number + 1) * batch_size)
    last = source.size - 1
    weight = (places <= last).astype(np.float32)
    return source.take(np.minimum(places, last)) | {"weight": weight}


def whole_batches(count: int, batch_size: int) -> int:
    """Batches in an epoch of ``count`` examples.

    Raises:
      ConfigError: there is none.
    """
    if count < batch_size:
        raise ConfigError(f"batch_size={batch_size} is more than the {count} examples")
    return count // batch_size


def examples_of_step(
    count: int, batch_size: int, seed: int, step: int
) -> tuple[int, np.ndarray]:
    """The epoch of a step, and which of ``count`` examples form its batch.

    Raises:
      ConfigError: there are fewer examples than a batch has.
    """
    epoch, place = divmod(step, whole_batches(count, batch_size))
    order = epoch_order(count, seed, epoch)
    return epoch, order[place * batch_size : (place + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch of a run sees the examples."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order.flags.writeable = False
    return order
