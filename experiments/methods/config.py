"""The configuration of methods that prune during training."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

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


Number = Literal["strength", "score", "score_rate"]
_DEFAULTS: dict[Number, dict[str, float]] = {
    "strength": {"soft_movement": 10.0, "l0": 0.1},
    "score": {"str": -3.0, "l0": 2.197},
    "score_rate": {"l0": 0.1},
}
"""The numbers of rules for which the usual ones would prune nothing, or everything."""
_USUAL: dict[Number, float] = {"strength": 1e-3, "score": 0.0, "score_rate": 1e-2}


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
      strength: of the pull of sr_ste, admm, elsa and safe, by default 1e-3; of the
        penalty of soft_movement, by default 10, and of l0, by default 0.1. The larger
        a penalty, the more of the weights are pruned.
      replaced: share of the kept weights that rigl and set replace at first.
      score: the initial learned numbers, by default 0 for movement and soft_movement,
        -3 for str, of which larger ones prune more, and 2.197 for l0.
      score_rate: the learning rate of scores and gates, at its peak; by default 0.1
        for l0, else 0.01.
      radius: of the balls of sfw, in norms of the initial weights.
    """

    begin: float = 0.0
    end: float = 0.75
    every: int = 20
    strength: float | None = None
    replaced: float = 0.3
    score: float | None = None
    score_rate: float | None = None
    radius: float = 10.0

    def used_by(self, rule: str) -> "PruningConfig":
        """With the numbers that a rule uses; the defaults, if it uses none."""
        if rule not in get_args(Method):
            return PruningConfig()
        numbers: dict[str, Any] = {name: self.number(name, rule) for name in _USUAL}
        return dataclasses.replace(self, **numbers)

    def number(self, name: Number, rule: str) -> float:
        """One of the numbers whose default depends on the rule."""
        given: float | None = getattr(self, name)
        return _DEFAULTS[name].get(rule, _USUAL[name]) if given is None else given
