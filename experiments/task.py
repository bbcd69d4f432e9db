"""What a task is, whatever its data."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cram_jax import prunable
from experiments.batches import Batch
from experiments.compression.targets import LeafFilters

Model = tuple[Any, Any]
"""Parameters and batch statistics; these are empty where there is no batch norm."""


class Task(NamedTuple):
    """What a network learns, as pure functions of plain trees.

    Attributes:
      init: ``seed -> (params, batch_stats)``.
      augment: ``(key, batch) -> batch``, the random part of a training step that is not
        the network's.
      loss_fn: ``(params, batch_stats, batch, dropout_key) -> (loss, batch_stats)``,
        training mode; the key may be omitted if there is no dropout. The batch may
        hold the outputs of a teacher, see `experiments.training.distillation`. Both
        gradients of a step use the same key.
      evaluate: ``(params, batch_stats, examples) -> metrics``, over every example:
        ``loss``, and others in percent, of which ``metric`` is the main one.
      predict: ``(params, batch_stats, batch) -> logits``, a tree of arrays with a row
        for each example, evaluation mode.
      evaluation_loss: ``(params, batch_stats, batch) -> loss``, evaluation mode; a mean
        over examples that accepts a batch of one.
      metric: the metric that models are chosen by; more is better.
      filters: the leaves that targets compress.
      head: the modules of the last layer.
      pretrained: ``seed -> (params, batch_stats)`` of the weights that the
        configuration names, or None; what they lack is drawn.
    """

    init: Callable[[int], Model]
    augment: Callable[[jax.Array, Batch], Batch]
    loss_fn: Callable[..., tuple[jax.Array, Any]]
    evaluate: Callable[[Any, Any, Any], dict[str, float]]
    predict: Callable[[Any, Any, Batch], Any]
    evaluation_loss: Callable[[Any, Any, Batch], jax.Array]
    metric: str = "accuracy"
    filters: LeafFilters = LeafFilters()
    head: tuple[str, ...] = ("head",)
    pretrained: Callable[[int], Model | None] = lambda seed: None

    def zeros(self, params: Any) -> float:
        """The share of zeros among the prunable weights."""
        chosen = prunable(params, self.filters.prunable)
        leaves = [*map(np.asarray, itertools.compress(jax.tree.leaves(params), chosen))]
        size = sum(leaf.size for leaf in leaves)
        return (size - sum(map(np.count_nonzero, leaves))) / size


def format_metrics(metrics: dict[str, float]) -> str:
    """Metrics in a line of text: ``accuracy 98.20 %, loss 0.0612``."""
    words = [
        f"{name.replace('_', ' ')} {value:.2f} %"
        for name, value in metrics.items()
        if name != "loss"
    ]
    return ", ".join([*words, f"loss {metrics['loss']:.4f}"])
