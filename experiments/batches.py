"""Examples, their batches, and the order in which a run sees them."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.errors import ConfigError

Arrays = Mapping[str, np.ndarray]  # with a common leading axis, one row an example
Batch = dict[str, Any]  # arrays of numpy, or of jax over a mesh


class Source(Protocol):
    """Examples to train on and to judge by, wherever they lie."""

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def take(self, chosen: Sequence[int] | np.ndarray) -> Batch:
        """Some of them, as they are judged."""
        ...

    def training_batches(
        self,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        positions: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """The batches of the steps from ``start`` up to ``stop``.

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
          An iterator of arrays by name, a row a position.

        Raises:
          ConfigError: there are fewer examples than a batch has.
        """
        ...

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, in order; the last batch is filled up with weight 0.

        Returns:
          An iterator of arrays by name, and ``weight`` (float32; 1 for an example, 0
          for filling), with a leading axis of ``batch_size``, so that one compilation
          serves all.
        """
        ...


class Examples(NamedTuple):
    """Examples in memory, a `Source`.

    Attributes:
      arrays: with a common leading axis, one row an example.
    """

    arrays: Arrays

    @property
    def size(self) -> int:
        """How many they are."""
        return len(next(iter(self.arrays.values())))

    def take(self, chosen: Sequence[int] | np.ndarray) -> Batch:
        """Some of them."""
        rows = np.asarray(chosen, np.intp)
        return {name: array[rows] for name, array in self.arrays.items()}

    def training_batches(
        self,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        positions: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """See `Source.training_batches`."""
        whole_batches(self.size, batch_size)  # raises, also where no step is asked for
        for step in range(start, stop):
            _, chosen = examples_of_step(self.size, batch_size, seed, step)
            yield self.take(chosen if positions is None else chosen[positions])

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """See `Source.evaluation_batches`."""
        weighted = Examples({**self.arrays, "weight": np.ones(self.size, np.float32)})
        for begin in range(0, self.size, batch_size):
            batch = weighted.take(range(begin, min(begin + batch_size, self.size)))
            fill = batch_size - len(batch["weight"])
            yield {
                name: np.pad(array, [(0, fill)] + [(0, 0)] * (array.ndim - 1))
                for name, array in batch.items()
            }


def whole_batches(count: int, batch_size: int) -> int:
    """Batches in an epoch of so many examples.

    Raises:
      ConfigError: there is none.
    """
    if count < batch_size:
        raise ConfigError(f"batch_size={batch_size} is more than the {count} examples")
    return count // batch_size


def examples_of_step(
    count: int, batch_size: int, seed: int, step: int
) -> tuple[int, np.ndarray]:
    """The epoch of a step, and which of so many examples are its batch.

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
