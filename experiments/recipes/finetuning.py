"""CrAM+ from pretrained weights, ten epochs: tables 2 and 3 of the paper.

    python -m experiments train cifar10_finetune --init-from RUN --data-dir DIRECTORY
    python -m experiments train imagenet_finetune --init-from FILE --data-dir DIRECTORY

RUN is the directory of a run with SGD, such as ``runs/cifar10_sgd-sgd-seed0``; FILE
holds torchvision's weights of ResNet-50 (``.pth`` or ``.safetensors``). Each has a
baseline with SGD (``_sgd``), equally long and from the same weights.
``imagenet_finetune`` also takes ``--model.name resnet18`` or ``resnet34``.

From the paper: ten epochs, and the methods. Neither its text nor the authors'
configurations give the learning rate: our choice is a tenth of that of training,
without warm-up. The rest is as in training.
"""

import dataclasses

from experiments.config import variant
from experiments.images.config import ImageConfig
from experiments.recipes import cifar10, cifar10_small, imagenet


def _runs(base: ImageConfig) -> tuple[ImageConfig, ...]:
    tuned = variant(
        dataclasses.replace(base, init_from=""),
        f"{base.name}_finetune",
        epochs=10,
        learning_rate=base.optimizer.learning_rate / 10,
        warmup=0.0,
    )
    return tuned, variant(tuned, f"{tuned.name}_sgd", rule="none")


configs = tuple(
    run
    for base in (cifar10.config, cifar10_small.config, imagenet.config)
    for run in _runs(base)
)
