"""What a run is: frozen dataclasses, checked when they are made."""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from experiments import targets as targets_module
from experiments.errors import ConfigError

Method = Literal["sgd", "sam", "cram", "cram_plus", "topk_plus"]
Base = Literal["sgd", "adam"]
Schedule = Literal["cosine", "linear"]
Dtype = Literal["float32", "bfloat16"]


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


@dataclass(frozen=True)
class RunConfig:
    """A run; with its seed it determines every number of the result.

    Attributes:
      name: names the run's directory.
      optimizer: the update rule and its schedule.
      epochs: passes over the training examples.
      label_smoothing: share of the label spread over all classes.
      seed: initial weights, order of the data, augmentation, drawn targets.
      init_from: the directory of a run to start from; None: the initial weights of the
        seed; empty: has to be named to train.
      new_head: a new last layer in place of the one of ``init_from``.
      targets: what the trained network is compressed to when it is evaluated.
      evaluate_every: epochs, or a part of one, between evaluations of the dense
        network, the best of which is stored in the run's ``best``; 0: at the end.
      checkpoint_every: epochs between checkpoints; 0: at the end.
      log_every: steps between lines of metrics.jsonl.
      patience: evaluations in a row without a better one after which training stops;
        the best model is then the model of the run. 0: never.
    """

    kind: ClassVar[str]

    name: str = "run"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 20
    label_smoothing: float = 0.0
    seed: int = 0
    init_from: str | None = None
    new_head: bool = False
    targets: tuple[str, ...] = ("dense", "k50", "k70", "k80", "k90", "k95")
    evaluate_every: float = 5
    checkpoint_every: int = 5
    log_every: int = 20
    patience: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, 1, "epochs", "log_every")
        check_at_least(
            self, 0, "evaluate_every", "checkpoint_every", "seed", "patience"
        )
        if self.optimizer.keep_pruned and self.init_from is None:
            raise ConfigError("keep_pruned needs init_from, a compressed model")
        in_range = 0 <= self.label_smoothing < 1
        check(self, "label_smoothing", in_range, "at least 0 and below 1")
        judged = self.patience == 0 or self.evaluate_every > 0
        check(self, "patience", judged, "0 where evaluate_every is 0")
        check_targets(self, training=False)


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def variant(
    config: AnyConfig,
    name: str,
    *,
    epochs: int | None = None,
    evaluate: tuple[str, ...] | None = None,
    **optimizer: Any,
) -> AnyConfig:
    """A configuration that differs in a few things, for runs to compare.

    Args:
      config: what it is a variant of.
      name: of the new run.
      epochs: of the new run; by default the same.
      evaluate: the targets to evaluate on; by default the same.
      **optimizer: changes to the fields of `OptimizerConfig`.

    Returns:
      The new configuration.
    """
    return dataclasses.replace(
        config,
        name=name,
        epochs=epochs or config.epochs,
        targets=evaluate or config.targets,
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
    )


def check(config: Any, name: str, holds: Any, expected: str) -> None:
    """Raises unless a field holds what is expected.

    Raises:
      ConfigError: it names the field, what is expected and the value.
    """
    if not holds:
        raise ConfigError(f"{name} must be {expected}, got {getattr(config, name)!r}")


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raises unless numbers are at least ``least``, see `check`."""
    for name in names:
        check(config, name, getattr(config, name) >= least, f"at least {least}")


def check_targets(config: Any, *, training: bool) -> None:
    """Raises unless every entry of ``targets`` names one, see `targets.check`."""
    for target in config.targets:
        targets_module.check(target, training=training)
