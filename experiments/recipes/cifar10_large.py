"""ResNet-18 and VGG-16 on CIFAR-10, trained for 95 %: tables 6 and 18 of the paper.

    python -m experiments train cifar10_resnet18 --data-dir DIRECTORY
    python -m experiments train cifar10_vgg16 --data-dir DIRECTORY

The same names with ``_sgd`` and ``_sam`` are the baselines; SGD trains twice as long.

From the paper: the methods and the sparsity. From the authors' configurations, where
the text leaves it out: 180 epochs without warm-up, rho 0.2, and the rest as in
`cifar10`, whose radius of SAM they share.
"""

import dataclasses

from experiments.config import variant
from experiments.images.config import ImageConfig, ModelConfig, ModelName
from experiments.recipes import cifar10


def _runs(name: str, model: ModelName) -> tuple[ImageConfig, ...]:
    base = dataclasses.replace(cifar10.config, model=ModelConfig(name=model))
    base = variant(base, name, epochs=180, warmup=0.0, rho=0.2, train_targets=("k95",))
    return (
        base,
        variant(base, f"{name}_sgd", epochs=360, rule="none"),
        variant(base, f"{name}_sam", rule="sam", rho=cifar10.sam.optimizer.rho),
    )


configs = (
    *_runs("cifar10_resnet18", "resnet18_cifar"),
    *_runs("cifar10_vgg16", "vgg16_bn_cifar"),
)
