"""The runs we publish, one table or figure a file."""

from experiments.config import Config, TextConfig
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
    squad,
    squad_small,
    sst2,
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
"""Runs on images."""

TEXT_CONFIGS: dict[str, TextConfig] = {
    config.name: config
    for module in (squad, squad_small, sst2)
    for config in module.configs
}
"""Runs on text."""
