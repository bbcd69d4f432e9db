"""A network and its examples, in the form that engines take."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cram_jax.engine import Graph
from experiments.batches import Batch, Source
from experiments.errors import ConfigError

Inputs: TypeAlias = tuple[np.ndarray, ...]
"""One array for each input of a graph, with a leading batch axis."""
Run: TypeAlias = Callable[[Inputs], np.ndarray[Any, Any]]
"""From inputs to the network's output."""


@dataclass(frozen=True)
class Network:
    """A network with its weights.

    Attributes:
      forward: the network in JAX, float32, compiled.
      nbytes: of its parameters and statistics in float32.
      inputs: names of its inputs.
      output: name of its output.
      make_graph: makes its graph; None: it is not one of ours.
      title: what it is called in an error.
    """

    forward: Callable[..., Any]
    nbytes: int
    inputs: tuple[str, ...]
    output: str
    make_graph: Callable[[], Graph] | None
    title: str = "this"

    @cached_property
    def graph(self) -> Graph:
        """What engines compile.

        Raises:
          ConfigError: the network is not one of ours, so that its graph is not known.
        """
        if self.make_graph is None:
            raise ConfigError(
                f"{self.title} is a network of your own: build its graph with "
                f"cram_jax.engine, see docs/guide/engine.md"
            )
        return self.make_graph()


class Samples(NamedTuple):
    """Examples to time, calibrate and evaluate a network with.

    Attributes:
      inputs: from a number to that many examples of the evaluation set, as one batch.
      calibration: from a number to that many training examples, in batches.
      score: evaluates a network, given as a `Run`, on the whole evaluation set, in
        percent; None if there are no labels.
      metric: what the score is.
    """

    inputs: Callable[[int], Inputs]
    calibration: Callable[[int], list[Inputs]]
    score: Callable[[Run], float] | None
    metric: str = "accuracy"


Scored: TypeAlias = Iterable[tuple[np.ndarray, Batch]]
"""Outputs of a network, each with its examples."""


def make_samples(
    train: Source,
    evaluation: Source,
    as_inputs: Callable[[Batch], Inputs],
    score: Callable[[Scored], float],
    metric: str,
    batch_size: int,
) -> Samples:
    """Samples of two sets of examples.

    Args:
      train: calibration examples are drawn from these, the same in every call.
      evaluation: what is timed and evaluated.
      as_inputs: from examples to inputs.
      score: from outputs to the metric.
      metric: its name.
      batch_size: of calibration and evaluation.
    """

    def inputs(count: int) -> Inputs:
        # A batch may be larger than the evaluation set.
        return as_inputs(evaluation.take(np.arange(count) % evaluation.size))

    def calibration(count: int) -> list[Inputs]:
        chosen = np.random.default_rng(0).permutation(train.size)[:count]
        return [
            as_inputs(train.take(np.sort(chosen[start : start + batch_size])))
            for start in range(0, len(chosen), batch_size)
        ]

    def outputs(run: Run) -> Iterator[tuple[np.ndarray, Batch]]:
        for start in range(0, evaluation.size, batch_size):
            rows = range(start, min(start + batch_size, evaluation.size))
            batch = evaluation.take(rows)
            yield run(as_inputs(batch)), batch

    return Samples(inputs, calibration, lambda run: score(outputs(run)), metric)


class Subject(NamedTuple):
    """A dense network, whose compressed forms engines run.

    Attributes:
      name: in tables.
      compress: from the name of a target to the network compressed to it.
      samples: its examples.
      eval_targets: the targets that its run is evaluated on.
    """

    name: str
    compress: Callable[[str], Network]
    samples: Samples
    eval_targets: tuple[str, ...] = ()
