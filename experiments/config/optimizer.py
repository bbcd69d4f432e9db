"""The update rule and what follows it."""

import re
import typing
from dataclasses import dataclass
from typing import Literal

from experiments.config.checks import check, check_at_least, check_targets
from experiments.errors import ConfigError

Method = Literal["sgd", "sam", "cram", "cram_plus", "topk_plus"]
Base = Literal["sgd", "adam"]
Schedule = Literal["cosine", "linear"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule, then a base optimiser with its weight decay and schedule.

    Attributes:
      method: sgd (the base optimiser alone, also where that is Adam), sam, cram
        (equation 2), cram_plus (equation 4), topk_plus (rho 0).
      targets: what to compress to, drawn at every step where there are several.
      masks_every: steps for which the masks of a target serve (appendix C.6).
      rho: radius of the ascent step.
      subsample: the compressed gradient on every so-manieth example of the batch; 1:
        all.
      plain_steps: share of the steps, drawn at random, that are left to the base
        optimiser alone: p(Adam) of appendix D.
      sparse_gradients: the compressed gradient of kept weights alone.
      normalize: divide the gradient by its norm before the ascent (sam always does).
      base: the base optimiser. The weight decay of sgd is added to the gradient; that
        of adam is decoupled from it, as in AdamW.
      learning_rate: at the peak of the schedule.
      schedule: how the learning rate falls to 0.
      warmup: share of the steps with a rising learning rate.
      momentum: of sgd.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: of all parameters that are not frozen.
      frozen: a regular expression; parameters whose path it matches stay as they are,
        in the ascent too, such as ``^bert/embeddings/``. Empty: none.
      keep_pruned: weights that are zero at the start stay zero, as those of a
        compressed model that ``init_from`` names.
    """

    method: Method = "cram_plus"
    targets: tuple[str, ...] = ("k50", "k70", "k80", "k90", "k95")
    masks_every: int = 1
    rho: float = 0.05
    subsample: int = 1
    plain_steps: float = 0.0
    sparse_gradients: bool = True
    normalize: bool = False
    base: Base = "sgd"
    learning_rate: float = 0.1
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    frozen: str = ""
    keep_pruned: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("base", Base), ("schedule", Schedule)):
            known = typing.get_args(kind)
            is_known = getattr(self, name) in known
            check(self, name, is_known, f"one of {', '.join(known)}")
        check_at_least(self, 0, "rho", "weight_decay")
        check_at_least(self, 1, "masks_every", "subsample")
        check(self, "learning_rate", self.learning_rate > 0, "above 0")
        for name in ("plain_steps", "warmup", "momentum"):
            in_range = 0 <= getattr(self, name) < 1
            check(self, name, in_range, "at least 0 and below 1")
        check(self, "targets", len(self.targets) >= 1, "at least one")
        check_targets(self, training=True)
        try:
            re.compile(self.frozen)
        except re.error as error:
            raise ConfigError(
                f"frozen must be a regular expression, got {self.frozen!r}: {error}"
            ) from error

    @property
    def method_name(self) -> str:
        """The method; the name of the base optimiser where that works alone."""
        return self.base if self.method == "sgd" else self.method
