"""The configuration of methods that prune during training."""

from dataclasses import dataclass
from typing import Literal, get_args

Method = Literal[
    "ste",
    "dpf",
    "sr_ste",
    "gradual",
    "acdc",
    "rigl",
    "set",
    "platon",
    "admm",
    "elsa",
    "safe",
    "str",
    "movement",
    "soft_movement",
    "l0",
    "sfw",
]

SEVERAL_TARGETS = ("ste",)
"""Methods that may train for several targets; the others need exactly one."""


def trains_for_one(rule: str) -> bool:
    """Whether a rule is a method whose run ends near one target."""
    return rule in get_args(Method) and rule not in SEVERAL_TARGETS


@dataclass(frozen=True)
class PruningConfig:
    """Settings of methods that prune during training; each reads its own.

    Attributes:
      begin: share of the steps before pruning begins. Of gradual, dpf, acdc, platon,
        movement, soft_movement.
      end: share of the steps after which the sparsity stays. Of the same, and of rigl
        and set, whose masks then stay.
      every: steps between renewals of masks, or of what admm, elsa and safe pull
        towards; the length of a phase of acdc; the window of platon. Of gradual and
        acdc at most the steps that are left after ``end``.
      strength: of the pull of sr_ste, admm, elsa and safe; of the penalty of
        soft_movement and l0.
      replaced: share of the kept weights that rigl and set replace at first.
      score: the initial learned numbers of str, movement, soft_movement and l0.
      score_rate: the learning rate of scores and gates, at its peak.
      radius: of the balls of sfw, in norms of the initial weights.
    """

    begin: float = 0.0
    end: float = 0.75
    every: int = 20
    strength: float = 1e-3
    replaced: float = 0.3
    score: float = 0.0
    score_rate: float = 1e-2
    radius: float = 10.0
