"""What a run is: frozen dataclasses, checked when they are made."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments import targets as targets_module
from experiments.errors import ConfigError

Method = Literal["sgd", "sam", "cram", "cram_plus", "topk_plus"]
ModelName = Literal[
    "resnet",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet18_cifar",
    "vgg16_bn_cifar",
    "resnet18",
    "resnet34",
    "resnet50",
]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
      name: the data set, see `experiments.data.images`.
      batch_size: images in a training step; the last partial batch is left out.
      shift: random shifts of up to so many pixels.
      flip: random horizontal flips.
      validation: training images held out and evaluated in place of the test images.
      calibration: training images for batch-norm recalibration.
      evaluation_batch: images in a batch of evaluation or recalibration.
    """

    name: str = "digits"
    batch_size: int = 64
    shift: int = 1
    flip: bool = False
    validation: int = 0
    calibration: int = 1000
    evaluation_batch: int = 250

    def __post_init__(self) -> None:
        for name in ("batch_size", "calibration", "evaluation_batch"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("shift", "validation"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
      name: resnet, for small images, with the widths and blocks given here; or one of
        fixed size: resnet20 to resnet56, resnet18_cifar and vgg16_bn_cifar for images
        as small as those of CIFAR, resnet18 to resnet50 for those of ImageNet.
      widths: channels of each stage of resnet.
      blocks: blocks of each stage of resnet.
      patch: side of the squares of pixels that become channels before the first layer;
        2 makes a network about four times faster, and a little less accurate. Of the
        ResNets for small images.
      dtype: of the activations; parameters, batch statistics and logits are float32.
    """

    name: ModelName = "resnet"
    widths: tuple[int, ...] = (16, 32)
    blocks: tuple[int, ...] = (1, 1)
    patch: int = 1
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        names, dtypes = typing.get_args(ModelName), typing.get_args(Dtype)
        _check(self, "name", self.name in names, f"one of {', '.join(names)}")
        _check(self, "dtype", self.dtype in dtypes, f"one of {', '.join(dtypes)}")
        _check(self, "widths", self.widths and min(self.widths) >= 1, "all at least 1")
        _check(self, "blocks", self.blocks and min(self.blocks) >= 1, "all at least 1")
        same = len(self.blocks) == len(self.widths)
        _check(self, "blocks", same, f"one a stage, like widths={self.widths}")
        _check(self, "patch", self.patch >= 1, "at least 1")
        if self.name != "resnet":
            for field_name in ("widths", "blocks"):
                default = getattr(type(self), field_name)
                fixed = getattr(self, field_name) == default
                _check(self, field_name, fixed, f"left at {default} for {self.name}")
        if self.name in ("vgg16_bn_cifar", "resnet18", "resnet34", "resnet50"):
            _check(self, "patch", self.patch == 1, f"1 for {self.name}")


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule, followed by weight decay and SGD with a cosine schedule.

    Attributes:
      method: sgd, sam, cram (equation 2), cram_plus (equation 4), topk_plus (rho 0).
      targets: what to compress to, drawn at every step where there are several.
      masks_every: steps for which the masks of a target serve (appendix C.6).
      rho: radius of the ascent step.
      subsample: the compressed gradient on every so-manieth image of the batch; 1: all.
      sparse_gradients: the compressed gradient of kept weights alone.
      normalize: divide the gradient by its norm before the ascent (sam always does).
      learning_rate: at the peak of the schedule.
      warmup: share of the steps with a rising learning rate.
      momentum: of SGD.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: of all parameters.
      keep_pruned: weights that are zero at the start stay zero, as those of a
        compressed model that `Config.init_from` names.
    """

    method: Method = "cram_plus"
    targets: tuple[str, ...] = ("k50", "k70", "k80", "k90", "k95")
    masks_every: int = 1
    rho: float = 0.05
    subsample: int = 1
    sparse_gradients: bool = True
    normalize: bool = False
    learning_rate: float = 0.1
    warmup: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    keep_pruned: bool = False

    def __post_init__(self) -> None:
        methods = typing.get_args(Method)
        _check(self, "method", self.method in methods, f"one of {', '.join(methods)}")
        _check(self, "rho", self.rho >= 0, "at least 0")
        for name in ("masks_every", "subsample"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "learning_rate", self.learning_rate > 0, "above 0")
        _check(self, "warmup", 0 <= self.warmup < 1, "at least 0 and below 1")
        _check(self, "momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        _check(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        _check(self, "targets", len(self.targets) >= 1, "at least one")
        _check_targets(self)


@dataclass(frozen=True)
class Config:
    """A run; with its seed it determines every number of the result.

    Attributes:
      name: names the run's directory.
      data: the data.
      model: the network.
      optimizer: the update rule and its schedule.
      epochs: passes over the training images.
      label_smoothing: share of the label spread over all classes.
      seed: initial weights, order of the data, augmentation, drawn targets.
      init_from: the directory of a run, or a file of torchvision's weights, to start
        from; None: the initial weights of the seed; empty: has to be named to train.
      new_head: a new classification layer in place of the one of ``init_from``.
      targets: what the trained network is compressed to when it is evaluated.
      evaluate_every: epochs between evaluations of the dense network; 0: at the end.
      checkpoint_every: epochs between checkpoints; 0: at the end.
      log_every: steps between lines of metrics.jsonl.
    """

    name: str = "digits"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 20
    label_smoothing: float = 0.0
    seed: int = 0
    init_from: str | None = None
    new_head: bool = False
    targets: tuple[str, ...] = ("dense", "k50", "k70", "k80", "k90", "k95")
    evaluate_every: int = 5
    checkpoint_every: int = 5
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("evaluate_every", "checkpoint_every", "seed"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        if self.optimizer.keep_pruned and self.init_from is None:
            raise ConfigError("keep_pruned needs init_from, a compressed model")
        in_range = 0 <= self.label_smoothing < 1
        _check(self, "label_smoothing", in_range, "at least 0 and below 1")
        _check_targets(self)


def variant(
    config: Config,
    name: str,
    *,
    epochs: int | None = None,
    evaluate: tuple[str, ...] | None = None,
    **optimizer: Any,
) -> Config:
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


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], cls: type = Config) -> Any:
    """Makes a configuration of what `to_dict` gave, by way of JSON.

    Raises:
      ConfigError: a name is unknown, or a value out of range.
    """
    types = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(types)):
        raise ConfigError(f"{cls.__name__} has no {unknown[0]!r}; it has {list(types)}")

    def read(kind: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(kind):
            return from_dict(value, kind)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: read(types[name], value) for name, value in values.items()})


def differences(one: Config, other: Config) -> list[str]:
    """The names of the fields in which two configurations differ."""
    first, second = _flat(to_dict(one)), _flat(to_dict(other))
    return [name for name in first if first[name] != second[name]]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _check(config: Any, name: str, holds: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}, got {getattr(config, name)!r}")


def _check_targets(config: Config | OptimizerConfig) -> None:
    for target in config.targets:
        targets_module.projector(target)
