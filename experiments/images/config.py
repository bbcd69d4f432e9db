"""Runs on images."""

import re
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from experiments.config import Dtype, RunConfig, check, check_at_least, check_numbers

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


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
      name: the data set, see `experiments.images.catalogue`; or "folder".
      folder: with ``name`` "folder", where your own images are: ``train/CLASS/``, and
        ``test/CLASS/`` unless ``validation`` holds some out.
      side: with ``name`` "folder", the height and width that images are scaled to, to
        train on them in memory; 0: they are decoded as needed and become 224x224.
      classes: the classes to keep of a data set in memory, which are renumbered; empty:
        all.
      labels: with ``name`` "folder", the names of the classes, in the order of their
        numbers; by default those of the folders, which a run remembers.
      batch_size: images in a training step; the last partial batch is left out.
      shift: largest random shift, in pixels.
      flip: random horizontal flips.
      validation: training images to hold out and evaluate instead of the test images.
      calibration: training images for batch-norm recalibration.
      evaluation_batch: images in a batch of evaluation or recalibration.
    """

    name: str = "digits"
    folder: str = ""
    side: int = 0
    classes: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    batch_size: int = 64
    shift: int = 1
    flip: bool = False
    validation: int = 0
    calibration: int = 1000
    evaluation_batch: int = 250

    def __post_init__(self) -> None:
        check_numbers(self)
        check_at_least(self, 1, "batch_size", "calibration", "evaluation_batch")
        check_at_least(self, 0, "shift", "validation", "side")
        fits = self.name == "folder" or not (self.folder or self.side)
        check(self, "name", fits, "folder, for --data.folder")
        distinct = len(set(self.classes)) == len(self.classes) != 1
        check(self, "classes", distinct, "two or more numbers, each once, or empty")
        check(self, "classes", min(self.classes, default=0) >= 0, "at least 0")


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
      name: resnet, for small images, with the widths and blocks given here; or one of
        fixed size: resnet20 to resnet56, resnet18_cifar and vgg16_bn_cifar for images
        as small as those of CIFAR, resnet18 to resnet50 for those of ImageNet.
      module: a network of your own instead of ``name``: ``package:factory``, where
        ``factory(channels=, classes=, rngs=)`` gives an NNX module that maps images
        and ``training=`` to logits.
      widths: channels of each stage of resnet.
      blocks: blocks of each stage of resnet.
      layer_widths: outputs of each convolution except shortcuts, in the order of the
        network, if they differ from those of ``name``, as after ``shrink``. Of a
        network of your own, how many channels are left of each family, in the order of
        `cram_jax.structure.trace_structure`; its initial weights are the first ones of
        a dense network.
      patch: side of the squares of pixels that become channels before the first layer;
        2 makes a network about four times faster, and a little less accurate. Only for
        the ResNets for small images.
      dtype: of the activations; parameters, batch statistics and logits are float32.
    """

    name: ModelName = "resnet"
    module: str = ""
    widths: tuple[int, ...] = (16, 32)
    blocks: tuple[int, ...] = (1, 1)
    layer_widths: tuple[int, ...] = ()
    patch: int = 1
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        names, dtypes = typing.get_args(ModelName), typing.get_args(Dtype)
        check(self, "name", self.name in names, f"one of {', '.join(names)}")
        check(self, "dtype", self.dtype in dtypes, f"one of {', '.join(dtypes)}")
        check(self, "widths", self.widths and min(self.widths) >= 1, "all at least 1")
        check(self, "blocks", self.blocks and min(self.blocks) >= 1, "all at least 1")
        same = len(self.blocks) == len(self.widths)
        check(self, "blocks", same, f"one a stage, like widths={self.widths}")
        check(self, "layer_widths", min(self.layer_widths, default=1) >= 1, "all >= 1")
        check(self, "patch", self.patch >= 1, "at least 1")
        dotted = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*|", self.module)
        check(self, "module", dotted, "like package:factory")
        if self.name != "resnet":
            for field_name in ("widths", "blocks"):
                default = getattr(type(self), field_name)
                fixed = getattr(self, field_name) == default
                check(self, field_name, fixed, f"left at {default} for {self.name}")
        if self.name in ("vgg16_bn_cifar", "resnet18", "resnet34", "resnet50"):
            check(self, "patch", self.patch == 1, f"1 for {self.name}")

    @property
    def title(self) -> str:
        """Its name in tables and files."""
        return self.module.replace(":", ".") or self.name


@dataclass(frozen=True)
class ImageConfig(RunConfig):
    """A run on images; it determines every number of the result.

    Attributes:
      data: the data.
      model: the network.
      init_from: the directory of a run, or a file of torchvision's weights, to start
        from; None: random initialisation; empty: required on the command line.
      new_head: whether to replace the classification layer of ``init_from`` by a new
        one.
    """

    kind: ClassVar[str] = "images"

    name: str = "digits"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def evaluated_on(self) -> dict[str, Any]:
        """See `RunConfig.evaluated_on`."""
        names = ("name", "folder", "side", "classes", "labels", "validation")
        return {name: getattr(self.data, name) for name in names}

    def check_inputs(self) -> None:
        """See `RunConfig.check_inputs`; also checks a folder of images."""
        if self.data.name == "folder":
            from experiments.images.folder import divided

            divided(self.data.folder, self.data.validation)
