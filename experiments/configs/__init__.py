"""The runs we publish, one a file."""

from experiments.config import Config
from experiments.configs import cifar10, cifar10_small, digits

CONFIGS: dict[str, Config] = {
    "digits": digits.config,
    "cifar10": cifar10.config,
    "cifar10_small": cifar10_small.config,
}
