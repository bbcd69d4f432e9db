"""What runs on images and on text have in common."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from experiments.config.checks import check, check_at_least, check_targets
from experiments.config.optimizer import OptimizerConfig
from experiments.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]


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
