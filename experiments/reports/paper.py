"""Figures of the paper that our reports print next to ours."""

from experiments.config import RunConfig
from experiments.recipes import cifar10

# Table 17: the dense network with SGD, in percent.
BASELINES = {("cifar10", "resnet20"): 93.0}

# Points above dense SGD, by the update rule and its targets: tables 17 and 6.
DIFFERENCES = {
    ("cifar10", "resnet20", cifar10.multi.optimizer): {
        "dense": 0.2,
        "k70": -0.1,
        "k80": -0.6,
        "k90": -2.7,
    },
    ("cifar10", "resnet20", cifar10.config.optimizer): {"k95": -3.8},
}


def baseline(config: RunConfig) -> float | None:
    """The paper's accuracy of the dense network with SGD, in percent, if known."""
    return BASELINES.get((config.data.name, config.model.name))


def difference(config: RunConfig, target: str) -> float | None:
    """The paper's accuracy above that of dense SGD, in points, if known."""
    key = (config.data.name, config.model.name, config.optimizer)
    return DIFFERENCES.get(key, {}).get(target)
