"""The runs we publish, one table or figure a file."""

from experiments.config import Config
from experiments.configs import (
    cifar10,
    cifar10_ablations,
    cifar10_large,
    cifar10_small,
    digits,
    finetuning,
    imagenet,
    imagenet_4bit,
    imagenet_infrequent,
    imagenet_nm,
    imagenet_uniform,
    transfer,
)

CONFIGS: dict[str, Config] = {
    config.name: config
    for module in (
        digits,
        cifar10,
        cifar10_ablations,
        cifar10_large,
        cifar10_small,
        imagenet,
        imagenet_nm,
        imagenet_uniform,
        imagenet_infrequent,
        imagenet_4bit,
        finetuning,
        transfer,
    )
    for config in module.configs
}
