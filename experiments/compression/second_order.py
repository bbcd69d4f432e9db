"""Second-order pruning of a trained model: oBERT on text, WoodFisher on images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.config import check, check_at_least, check_numbers

if TYPE_CHECKING:  # the command line needs the options without jax
    from cram_jax import Projector
    from experiments.task import Task


@dataclass(frozen=True)
class SecondOrder:
    """Settings of second-order pruning, see `cram_jax.second_order`.

    Attributes:
      gradients: training examples whose gradients estimate the curvature.
      block_size: weights in a block of it.
      damping: added to its diagonal.
      recomputations: how often it is computed on the way to the sparsity.
      micro_batch: gradients computed at a time; affects only speed and memory.
    """

    gradients: int = 1024
    block_size: int = 50
    damping: float = 1e-7
    recomputations: int = 4
    micro_batch: int = 16

    def __post_init__(self) -> None:
        check_numbers(self)
        check_at_least(
            self, 1, "gradients", "block_size", "recomputations", "micro_batch"
        )
        check(self, "damping", self.damping > 0, "above 0")


def second_order(
    task: "Task",
    examples: Any,
    batch_stats: Any,
    options: SecondOrder,
    sparsity: float,
) -> "Projector":
    """The projector of a target such as o90, for trained models.

    The loss is that of evaluation, without dropout and label smoothing, and with the
    batch statistics of the dense model.

    Args:
      task: for its loss and its prunable leaves.
      examples: the training examples; some are drawn at random, always the same.
      batch_stats: of the dense model.
      options: the remaining settings.
      sparsity: share of zeros, of all prunable leaves together.

    Returns:
      The projector; kept weights move.
    """
    import numpy as np

    import cram_jax

    drawn = np.random.default_rng(0).permutation(examples.size)[: options.gradients]
    return cram_jax.second_order(
        sparsity,
        task.evaluation_loss,
        {"batch": examples.take(np.sort(drawn))},
        where=task.filters.prunable,
        block_size=options.block_size,
        damping=options.damping,
        recomputations=options.recomputations,
        micro_batch=options.micro_batch,
        constants={"batch_stats": batch_stats},
    )
