"""The methods of the paper on CIFAR-10, sized for two CPU cores.

    python -m experiments train cifar10_small --data-dir DIRECTORY
    python -m experiments evaluate runs/cifar10_small-cram_plus-seed0

- `cifar10_small`: CrAM+-Multi, 50 to 95 %.
- `cifar10_small_nm`: CrAM+-N:M, 2:4 or 4:8 with equal chance.
- `cifar10_small_blocks`: blocks of 4 inputs and 2 outputs, the shape that an engine on
  CPUs computes fastest, 50 to 90 % of every layer.
- `cifar10_small_channels`: 25 to 75 % of the channels of all layers, which `shrink`
  then cuts out.
- `cifar10_small_gradual`, `cifar10_small_acdc`, for twice as many epochs: one network
  for 90 %.
- `cifar10_small_sgd`, for twice as many epochs.
- `cifar10_small_sam`.

A small ResNet (79,338 parameters): squares of 2x2 pixels become channels, so that a
step is about four times faster; eight epochs take about ten minutes. Otherwise the
settings are those of `cifar10`, except for a tenth of the steps as warm-up, and rho 0.1
for SAM.
"""

import dataclasses

from experiments.config import variant
from experiments.images.config import ModelConfig
from experiments.recipes import cifar10

config = dataclasses.replace(
    cifar10.config,
    name="cifar10_small",
    model=ModelConfig(widths=(16, 32, 64), blocks=(1, 1, 1), patch=2),
    optimizer=dataclasses.replace(cifar10.config.optimizer, warmup=0.1),
    epochs=8,
    evaluate_every=0,
    checkpoint_every=2,
)

blocks = variant(
    config,
    "cifar10_small_blocks",
    eval_targets=("dense", "b50", "b70", "b80", "b90", "b95", "k90", "u90"),
    train_targets=("b50", "b70", "b80", "b90"),
)

channels = variant(
    config,
    "cifar10_small_channels",
    eval_targets=("dense", "c25", "c50", "c75"),
    train_targets=("c25", "c50", "c75"),
)

configs = (
    config,
    variant(config, "cifar10_small_nm", train_targets=("2:4", "4:8")),
    blocks,
    channels,
    variant(config, "cifar10_small_sgd", epochs=2 * config.epochs, rule="none"),
    variant(config, "cifar10_small_sam", rule="sam", rho=0.1),
    variant(
        config,
        "cifar10_small_gradual",
        epochs=2 * config.epochs,
        rule="gradual",
        train_targets=("k90",),
    ),
    variant(
        config,
        "cifar10_small_acdc",
        epochs=2 * config.epochs,
        rule="acdc",
        train_targets=("k90",),
    ),
)
