"""Pruning that looks at a trained network and its training data."""

from functools import cached_property
from typing import Any, Protocol

import numpy as np

import cram_jax
from cram_jax import layerwise
from cram_jax.structure import InputGrams, input_grams
from experiments.batches import Source
from experiments.compression.options import PrunerOptions
from experiments.compression.second_order import second_order
from experiments.task import Task

Pattern = float | tuple[int, int]
"""A share of zeros, or n of every m."""


class Pruners(Protocol):
    """Makes the projectors of such targets."""

    def second_order(self, sparsity: float) -> cram_jax.Projector:
        """Of ``o90``."""
        ...

    def wanda(self, pattern: Pattern, where: Any) -> cram_jax.Projector:
        """Of ``w90`` and ``w2:4``."""
        ...

    def sparse_gpt(
        self, pattern: Pattern, where: Any, bits: int | None
    ) -> cram_jax.Projector:
        """Of ``g90``, ``g2:4`` and ``g90@4bit``."""
        ...

    def refit(self, projector: cram_jax.Projector, where: Any) -> cram_jax.Projector:
        """Of ``rk90`` from that of ``k90``."""
        ...


class TrainedPruners:
    """Pruners of one trained network, which know its data.

    Args:
      task: for its loss, in evaluation mode, and its prunable leaves.
      examples: the training examples; some are drawn at random, always the same.
      params: of the dense network.
      batch_stats: of the dense network.
      options: the remaining settings.
    """

    def __init__(
        self,
        task: Task,
        examples: Source,
        params: Any,
        batch_stats: Any,
        options: PrunerOptions,
    ) -> None:
        self.task, self.examples, self.options = task, examples, options
        self.params, self.batch_stats = params, batch_stats

    @cached_property
    def grams(self) -> InputGrams:
        """The sums of the products of every layer's inputs."""
        options = self.options.layerwise
        count = min(options.examples, self.examples.size)
        batch = min(options.batch, count)
        drawn = np.random.default_rng(0).permutation(self.examples.size)
        batches = (
            self.examples.take(np.sort(drawn[first : first + batch]))
            for first in range(0, count - batch + 1, batch)
        )

        def apply(params: Any, batch: Any) -> Any:
            return self.task.evaluation_loss(params, self.batch_stats, batch)

        return input_grams(apply, self.params, batches)

    def second_order(self, sparsity: float) -> cram_jax.Projector:
        """See `Pruners`."""
        options = self.options.second_order
        return second_order(
            self.task, self.examples, self.batch_stats, options, sparsity
        )

    def wanda(self, pattern: Pattern, where: Any) -> cram_jax.Projector:
        """See `Pruners`."""
        return layerwise.wanda(pattern, self.grams, where=where)

    def sparse_gpt(
        self, pattern: Pattern, where: Any, bits: int | None
    ) -> cram_jax.Projector:
        """See `Pruners`."""
        damping = self.options.layerwise.damping
        return layerwise.sparse_gpt(
            pattern, self.grams, bits=bits, damping=damping, where=where
        )

    def refit(self, projector: cram_jax.Projector, where: Any) -> cram_jax.Projector:
        """See `Pruners`."""
        damping = self.options.layerwise.damping
        return layerwise.refit(projector, self.grams, damping=damping, where=where)


class AbstractPruners:
    """Stand-ins that need no data and reject the same shapes."""

    def second_order(self, sparsity: float) -> cram_jax.Projector:
        """It fits every shape."""
        del sparsity
        return cram_jax.identity()

    def wanda(self, pattern: Pattern, where: Any) -> cram_jax.Projector:
        """Groups have to divide the inputs."""
        if isinstance(pattern, tuple):
            return cram_jax.n_m(*pattern, where=where)
        return cram_jax.top_k(pattern, scope="layer", where=where)

    def sparse_gpt(
        self, pattern: Pattern, where: Any, bits: int | None
    ) -> cram_jax.Projector:
        """Groups have to divide the inputs."""
        del bits
        return self.wanda(pattern, where)

    def refit(self, projector: cram_jax.Projector, where: Any) -> cram_jax.Projector:
        """What the projector fits."""
        del where
        return projector
