"""Settings of pruning that looks at a trained network and its data."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from experiments.compression import targets
from experiments.compression.second_order import SecondOrder
from experiments.config import check, check_at_least, check_numbers


@dataclass(frozen=True)
class Layerwise:
    """Settings of layer-wise pruning, see `cram_jax.layerwise`.

    Attributes:
      examples: training examples from which the inputs of every layer are collected.
      batch: how many at a time; affects only speed and memory.
      damping: added to the diagonal, as a share of its mean.
    """

    examples: int = 1024
    batch: int = 64
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_numbers(self)
        check_at_least(self, 1, "examples", "batch")
        check(self, "damping", self.damping > 0, "above 0")


@dataclass(frozen=True)
class PrunerOptions:
    """Settings of all such pruning.

    Attributes:
      second_order: of ``o90``.
      layerwise: of ``w90``, ``g90`` and ``rk90``.
    """

    second_order: SecondOrder = field(default_factory=SecondOrder)
    layerwise: Layerwise = field(default_factory=Layerwise)

    def used_by(self, target: str) -> dict[str, Any]:
        """The settings that a target depends on, by option; empty if there are none."""
        used: dict[str, Any] = {}
        parts = targets.parse(target)
        if any(part.form == "second order" for part in parts):
            values = dataclasses.asdict(self.second_order)
            used |= {f"second_order.{n}": value for n, value in values.items()}
            del used["second_order.micro_batch"]
        if any(part.refitted or part.form in ("wanda", "sparse gpt") for part in parts):
            values = dataclasses.asdict(self.layerwise)
            used |= {f"layerwise.{n}": value for n, value in values.items()}
        return used
