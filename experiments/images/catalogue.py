"""The data sets we know: their splits, labels and image sizes."""

from typing import NamedTuple


class DatasetInfo(NamedTuple):
    """What tensorflow-datasets does not say about a data set, or names differently.

    Attributes:
      dataset: its name there.
      train: the split to train on, or several joined by ``+``.
      test: the split to evaluate on.
      classes: number of classes.
      size: height and width of the images; None if they differ and are large: they
        become 224x224.
    """

    dataset: str
    train: str = "train"
    test: str = "test"
    classes: int = 10
    size: tuple[int, int] | None = None


_both = "train+validation"

CATALOGUE: dict[str, DatasetInfo] = {
    "digits": DatasetInfo("digits", size=(8, 8)),
    "cifar10": DatasetInfo("cifar10", size=(32, 32)),
    "cifar100": DatasetInfo("cifar100", classes=100, size=(32, 32)),
    "imagenet2012": DatasetInfo("imagenet2012", test="validation", classes=1000),
    # To transfer to; resized to 224x224, including CIFAR's.
    "transfer_aircraft": DatasetInfo("fgvc_aircraft", _both, classes=100),
    "transfer_birdsnap": DatasetInfo("birdsnap", classes=500),
    "transfer_caltech101": DatasetInfo("caltech101", classes=102),
    "transfer_caltech256": DatasetInfo("caltech256", classes=257),
    "transfer_cars": DatasetInfo("cars196", classes=196),
    "transfer_cifar10": DatasetInfo("cifar10"),
    "transfer_cifar100": DatasetInfo("cifar100", classes=100),
    "transfer_dtd": DatasetInfo("dtd", _both, classes=47),
    "transfer_flowers": DatasetInfo("oxford_flowers102", _both, classes=102),
    "transfer_food101": DatasetInfo("food101", test="validation", classes=101),
    "transfer_pets": DatasetInfo("oxford_iiit_pet", classes=37),
    "transfer_sun397": DatasetInfo("sun397", _both, classes=397),
}

TRANSFER_SETS = tuple(name for name in CATALOGUE if name.startswith("transfer_"))
"""The twelve of Iofinova et al. (2022); the paper's own list was not at hand."""
