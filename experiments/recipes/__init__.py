"""The runs we publish, one file per subject."""

from experiments.config import RunConfig
from experiments.images.config import ImageConfig
from experiments.recipes import (
    cifar10,
    cifar10_ablations,
    cifar10_large,
    cifar10_small,
    cifar10_wide,
    digits,
    finetuning,
    imagenet,
    own,
    squad,
    squad_small,
    sst2,
    transfer,
)
from experiments.text.config import TextConfig

IMAGE_RECIPES: dict[str, ImageConfig] = {
    config.name: config
    for configs in (
        digits.configs,
        own.image_configs,
        cifar10.configs,
        cifar10_ablations.configs,
        cifar10_large.configs,
        cifar10_small.configs,
        cifar10_wide.configs,
        imagenet.configs,
        finetuning.configs,
        transfer.configs,
    )
    for config in configs
}

TEXT_RECIPES: dict[str, TextConfig] = {
    config.name: config
    for configs in (own.text_configs, squad.configs, squad_small.configs, sst2.configs)
    for config in configs
}

RECIPES: dict[str, RunConfig] = {**IMAGE_RECIPES, **TEXT_RECIPES}


def summary(config: RunConfig) -> str:
    """A recipe in one line."""
    rule = config.optimizer
    words = [f"{config.model.title} on {config.data.name}", rule.rule_name]
    if rule.rule not in ("none", "sam"):
        words[-1] += f" for {' '.join(rule.train_targets)}"
    if rule.keep_pruned:
        words.append("pruned weights stay zero")
    words.append(f"{config.epochs} epochs")
    if config.init_from == "":
        words.append("from a trained model")
    return ", ".join(words)
