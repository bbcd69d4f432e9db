"""The configuration of a run: frozen dataclasses, checked when they are made."""

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from experiments.compression import targets
from experiments.errors import ConfigError
from experiments.methods.config import Method, PruningConfig, trains_for_one

GradientRule = Literal["none", "sam", "cram", "cram_plus", "topk_plus"]
Rule = Literal[GradientRule, Method]
Base = Literal["sgd", "adam"]
Schedule = Literal["cosine", "linear", "constant"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule, then a base optimiser with its weight decay and schedule.

    Attributes:
      rule: none (only the base optimiser), sam, cram (equation 2), cram_plus (equation
        4), topk_plus (rho 0); or a method that prunes during training, see
        `experiments.methods`.
      train_targets: what to compress to; if there are several, one is drawn at every
        step. Most methods that prune during training take exactly one.
      masks_every: steps between new masks of a target (appendix C.6).
      rho: radius of the ascent step.
      subsample: compute the compressed gradient on every n-th example (1 = all).
      batch_share: share of the batch for each of a step's two gradients, which overlap
        if it is above a half: 0.625 saves three eighths of the work. 1: all of it.
      plain_steps: share of the steps, drawn at random, that use only the base
        optimiser: p(Adam) of appendix D.
      sparse_gradients: whether to zero the compressed gradient of pruned weights.
      normalize: divide the gradient by its norm before the ascent (sam always does).
      base: the base optimiser. The weight decay of sgd is added to the gradient; that
        of adam is decoupled from it, as in AdamW.
      learning_rate: at the peak of the schedule.
      schedule: how the learning rate decays to 0; with constant it does not, so that
        epochs can be added to a run later.
      warmup: share of the steps with a rising learning rate.
      momentum: for sgd.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: of all parameters that are not frozen.
      clip_norm: clips the global norm of the update before the base optimiser; 0: no
        clipping.
      accumulate: parts that a batch is divided into, to fit into memory; their
        gradients are averaged, in the compressed pass too. Batch norm sees one part at
        a time. On a CPU convolutions are slow in such a loop, as with ``plain_steps``.
      ema: decay of a running average of the weights, such as 0.999; the average is then
        what is evaluated and compressed. 0: none.
      frozen: a regular expression, such as ``^bert/embeddings/``; parameters whose path
        it matches do not change, not even in the ascent. Empty: none.
      keep_pruned: whether weights that are zero at the start stay zero, such as those
        of a compressed model named by ``init_from``.
      pruning: settings of methods that prune during training.
    """

    rule: Rule = "cram_plus"
    train_targets: tuple[str, ...] = ("k50", "k70", "k80", "k90", "k95")
    masks_every: int = 1
    rho: float = 0.05
    subsample: int = 1
    batch_share: float = 1.0
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
    clip_norm: float = 0.0
    accumulate: int = 1
    ema: float = 0.0
    frozen: str = ""
    keep_pruned: bool = False
    pruning: PruningConfig = field(default_factory=PruningConfig)

    def __post_init__(self) -> None:
        for name, kind in (("rule", Rule), ("base", Base), ("schedule", Schedule)):
            known = typing.get_args(kind)
            is_known = getattr(self, name) in known
            check(self, name, is_known, f"one of {', '.join(known)}")
        check_numbers(self)
        check_at_least(self, 0, "rho", "weight_decay", "clip_norm")
        check_at_least(self, 1, "masks_every", "subsample", "accumulate")
        check(self, "learning_rate", self.learning_rate > 0, "above 0")
        for name in ("plain_steps", "warmup", "momentum", "ema"):
            in_range = 0 <= getattr(self, name) < 1
            check(self, name, in_range, "at least 0 and below 1")
        check(self, "batch_share", 0 < self.batch_share <= 1, "above 0 and at most 1")
        if self.rule == "none" or self.rule in typing.get_args(Method):
            is_all = self.batch_share == 1
            check(self, "batch_share", is_all, f"1 for rule {self.rule}")
        check(self, "train_targets", self.train_targets, "at least one")
        for target in self.train_targets:
            targets.check(target, training=True)
        if trains_for_one(self.rule):
            is_one = len(self.train_targets) == 1
            check(self, "train_targets", is_one, f"one target for rule {self.rule}")
            for name in ("ema", "plain_steps"):
                check(self, name, not getattr(self, name), f"0 for rule {self.rule}")
        check_pruning(self.pruning)
        try:
            re.compile(self.frozen)
        except re.error as error:
            raise ConfigError(
                f"frozen must be a regular expression, got {self.frozen!r}: {error}"
            ) from error

    @property
    def rule_name(self) -> str:
        """The rule; the name of the base optimiser if there is none."""
        return self.base if self.rule == "none" else self.rule


@dataclass(frozen=True)
class DistillationConfig:
    """How a run learns from its teacher.

    Attributes:
      weight: of the divergence from the teacher's outputs; the labels get the rest.
      temperature: what logits are divided by first; above 1, more of the teacher's view
        of the wrong classes shows.
    """

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "weight", 0 < self.weight <= 1, "above 0 and at most 1")
        check(self, "temperature", self.temperature > 0, "above 0")


@dataclass(frozen=True)
class RunConfig:
    """A run; it determines every number of the result.

    Attributes:
      name: names the run's directory.
      optimizer: the update rule and its schedule.
      epochs: passes over the training examples.
      label_smoothing: share of the label that is spread over all classes.
      seed: for initial weights, order of the data, augmentation and drawn targets.
      init_from: the directory of a run to start from; None: random initialisation;
        empty: required on the command line.
      new_head: whether to replace the last layer of ``init_from`` by a new one.
      teacher: the directory of a run whose outputs are learned along with the labels,
        such as the dense network of one that was made smaller; None: only the labels.
      distillation: how they are learned.
      eval_targets: what the trained network is compressed to when it is evaluated.
      evaluate_every: epochs, or a fraction of one, between evaluations of the dense
        network; the best is stored in the run's ``best``. 0: only at the end.
      checkpoint_every: epochs between checkpoints; 0: only at the end.
      log_every: steps between lines of metrics.jsonl.
      patience: stop after this many evaluations in a row without improvement; the best
        model is then the model of the run. 0: never stop early.
      data: the data, which depend on the kind of run.
      model: the network, which depends on the kind of run.
    """

    kind: ClassVar[str]

    name: str = "run"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 20
    label_smoothing: float = 0.0
    seed: int = 0
    init_from: str | None = None
    new_head: bool = False
    teacher: str | None = None
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    eval_targets: tuple[str, ...] = ("dense", "k50", "k70", "k80", "k90", "k95")
    evaluate_every: float = 5
    checkpoint_every: int = 5
    log_every: int = 20
    patience: int = 0
    data: Any = None
    model: Any = None

    def __post_init__(self) -> None:
        check_name(self.name)
        check_numbers(self)
        check_at_least(self, 1, "epochs", "log_every")
        check_at_least(
            self, 0, "evaluate_every", "checkpoint_every", "seed", "patience"
        )
        if self.optimizer.keep_pruned and self.init_from is None:
            raise ConfigError("keep_pruned needs init_from, a compressed model")
        in_range = 0 <= self.label_smoothing < 1
        check(self, "label_smoothing", in_range, "at least 0 and below 1")
        if trains_for_one(self.optimizer.rule):
            reason = (
                f"0 for rule {self.optimizer.rule}, whose last model is the pruned one"
            )
            check(self, "patience", self.patience == 0, reason)
        judged = self.patience == 0 or self.evaluate_every > 0
        check(self, "patience", judged, "0 if evaluate_every is 0")
        check(self, "eval_targets", self.eval_targets, "at least one")
        for target in self.eval_targets:
            targets.check(target)

    @property
    def evaluated_on(self) -> dict[str, Any]:
        """What decides which examples it is evaluated on, and their classes."""
        raise NotImplementedError

    def check_inputs(self) -> None:
        """Raises unless the inputs of a run are named and exist; needs no jax."""


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def variant(
    config: AnyConfig,
    name: str,
    *,
    epochs: int | None = None,
    eval_targets: tuple[str, ...] | None = None,
    **optimizer: Any,
) -> AnyConfig:
    """A configuration that differs in a few fields, for runs to compare.

    Args:
      config: what it is a variant of.
      name: of the new run.
      epochs: of the new run; by default the same.
      eval_targets: of the new run; by default the same.
      **optimizer: changes to the fields of `OptimizerConfig`.

    Returns:
      The new configuration.
    """
    return dataclasses.replace(
        config,
        name=name,
        epochs=epochs or config.epochs,
        eval_targets=eval_targets or config.eval_targets,
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
    )


def check_pruning(config: PruningConfig) -> None:
    """Raises unless the numbers of a method are in range, see `check`."""
    check_numbers(config)
    check_at_least(config, 1, "every")
    check_at_least(config, 0, "begin")
    check(config, "end", config.begin <= config.end <= 1, "from begin to 1")
    check(config, "replaced", 0 <= config.replaced <= 1, "from 0 to 1")
    check(config, "radius", config.radius > 0, "above 0")
    if config.strength is not None:
        check_at_least(config, 0, "strength")
    if config.score_rate is not None:
        check(config, "score_rate", config.score_rate > 0, "above 0")


def check(config: Any, name: str, holds: Any, expected: str) -> None:
    """Raises unless a field has an allowed value.

    Raises:
      ConfigError: it names the field, what is expected and the value.
    """
    if not holds:
        raise ConfigError(f"{name} must be {expected}, got {getattr(config, name)!r}")


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raises unless numbers are at least ``least``, see `check`."""
    for name in names:
        check(config, name, getattr(config, name) >= least, f"at least {least}")


def check_numbers(config: Any) -> None:
    """Raises unless every number is finite and every integer fits 32 bits.

    Raises:
      ConfigError: it names the field, what is expected and the value.
    """
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, float):
            check(config, entry.name, math.isfinite(value), "a finite number")
        elif isinstance(value, int):
            check(config, entry.name, abs(value) < 2**31, "below 2^31")


def check_name(name: str) -> None:
    """Raises unless a name can be a file name.

    Raises:
      ConfigError: it is empty, hidden, too long, or has a slash or control characters.
    """
    length = len(name.encode(errors="replace"))
    if (
        not name.isprintable()
        or not 1 <= length <= 100
        or name[0] in ".-"
        or set(name) & set("/\\")
    ):
        shown = name if length <= 100 else name[:40] + "..."
        raise ConfigError(
            f"name must be 1 to 100 printable characters, without slashes and not "
            f"starting with a dot or a dash, got {shown!r}"
        )
