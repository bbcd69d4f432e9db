"""The runs we publish, one table or figure a file."""

from experiments.images.config import Config
from experiments.recipes import (
    cifar10,
    cifar10_ablations,
    cifar10_large,
    cifar10_small,
    digits,
    finetuning,
    imagenet,
    squad,
    squad_small,
    sst2,
    transfer,
)
from experiments.text.config import TextConfig

CONFIGS: dict[str, Config] = {
    config.name: config
    for module in (
        digits,
        cifar10,
        cifar10_ablations,
        cifar10_large,
        cifar10_small,
        imagenet,
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
