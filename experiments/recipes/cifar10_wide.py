"""A network wide enough for speed to matter: trained with SGD, then for blocks.

    python -m experiments train cifar10_wide_sgd --data-dir DIRECTORY
    python -m experiments train cifar10_wide --data-dir DIRECTORY \
        --init-from runs/cifar10_wide_sgd-sgd-seed0

- `cifar10_wide_sgd`: SGD from scratch.
- `cifar10_wide`: CrAM+ from there, for blocks of 4 inputs and 2 outputs, 50 to 90 % of
  every layer.

The network of `cifar10_small` with twice its channels (311,242 parameters). The
settings are those of `cifar10_small` and of `finetuning`; only the epochs are fewer.
"""

import dataclasses

from experiments.config import variant
from experiments.recipes import cifar10_small, finetuning

_wide = dataclasses.replace(cifar10_small.config.model, widths=(32, 64, 128))

sgd = variant(
    dataclasses.replace(cifar10_small.config, model=_wide),
    "cifar10_wide_sgd",
    epochs=10,
    rule="none",
)

config = dataclasses.replace(
    finetuning.blocks, name="cifar10_wide", model=_wide, epochs=5
)

configs = (config, sgd)
