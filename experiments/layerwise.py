"""How targets such as w90, g90 and rk90 look at the inputs of each layer."""

from dataclasses import dataclass

from experiments.config import check, check_at_least, check_numbers


@dataclass(frozen=True)
class Layerwise:
    """How layer-wise pruning goes about it, see `cram_jax.layerwise`.

    Attributes:
      examples: training examples whose inputs of every layer are summed over.
      batch: how many at a time; changes only speed and memory.
      damping: added to the diagonal, as a share of its mean.
    """

    examples: int = 1024
    batch: int = 64
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_numbers(self)
        check_at_least(self, 1, "examples", "batch")
        check(self, "damping", self.damping > 0, "above 0")
