"""CrAM+ from pretrained weights, ten epochs: tables 2 and 3 of the paper.

    python -m experiments train cifar10_finetune --init-from RUN --data-dir DIRECTORY
    python -m experiments train imagenet_finetune --init-from FILE --data-dir DIRECTORY

RUN is the directory of a run with SGD, such as ``runs/cifar10_sgd-sgd-seed0``; FILE
holds torchvision's weights of ResNet-50 (``.pth`` or ``.safetensors``). Each has a
baseline with SGD (``_sgd``), equally long and from the same weights.
``cifar10_small_blocks_finetune`` is for blocks of 4 inputs and 2 outputs, which engines
compute fast. ``imagenet_finetune`` also takes ``--model.name resnet18`` or
``resnet34``.

From the paper: ten epochs, and the methods. Neither its text nor the authors'
configurations give the learning rate: our choice is a tenth of that of training,
without warm-up. For blocks, which are harder, it is half: of the two, the better one
when pruned (docs/guide/results.md). The rest is as in training.
"""

import dataclasses

from experiments.config import variant
from experiments.images.config import ImageConfig
from experiments.recipes import cifar10, cifar10_small, imagenet


def _tuned(base: ImageConfig) -> ImageConfig:
    return variant(
        dataclasses.replace(base, init_from=""),
        f"{base.name}_finetune",
        epochs=10,
        learning_rate=base.optimizer.learning_rate / 10,
        warmup=0.0,
    )


def _with_baseline(tuned: ImageConfig) -> tuple[ImageConfig, ...]:
    return tuned, variant(tuned, f"{tuned.name}_sgd", rule="none")


blocks = variant(
    _tuned(cifar10_small.blocks), "cifar10_small_blocks_finetune", learning_rate=0.05
)

configs = (
    *_with_baseline(_tuned(cifar10.config)),
    *_with_baseline(_tuned(cifar10_small.config)),
    blocks,
    *_with_baseline(_tuned(imagenet.config)),
)
