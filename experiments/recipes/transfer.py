"""Transfer of pruned networks to other data sets: figure 2 of the paper.

    python -m experiments train transfer_food101 --init-from MODEL --data-dir DIRECTORY

MODEL is a compressed model, from ``compress runs/imagenet-cram_plus-seed0 --target
k80``. Its masks stay fixed, its classification layer is replaced by a new one, and all
kept weights train on. The twelve data sets are in `experiments.images.catalogue`. A
dense model transfers in the same way.

From the paper: fixed masks and a new classification layer. Neither its text nor the
authors' configurations gave us the rest. The data sets are those of Iofinova et al.
(2022), by two of the paper's authors; 150 epochs of SGD with batches of 64, learning
rate 0.01 and weight decay 5e-4 follow Salman et al. (2020), with our cosine in place of
their steps.

Small ones, whose pruned networks come from a run on this machine:

- `transfer_small`: a compressed `cifar10_small`, whose classes are learnt anew.
- `transfer_halves`: from five classes of CIFAR-10 (`cifar10_half`) to the other five.
- `transfer_digits`: the same of the digits (`digits_half`), in a minute:

      python -m experiments train digits_half --run runs/half
      python -m experiments compress runs/half --target rk80
      python -m experiments train transfer_digits --init-from runs/half/compressed/rk80

Its learning rate is that of the digits, the best of 0.05, 0.1, 0.2 and 0.4 (83.3, 92.7,
97.3 and 98.7 %) on 150 training images that were held out, one seed; 200 steps at 0.01
leave it at 72.7 % of the test images. The two on CIFAR-10 keep 0.01, which was not
tuned.
"""

import dataclasses

from experiments.config import variant
from experiments.images.catalogue import TRANSFER_SETS
from experiments.images.config import ImageConfig
from experiments.recipes import cifar10_small, digits, imagenet

_base = variant(
    dataclasses.replace(imagenet.config, init_from="", new_head=True),
    "transfer",
    epochs=150,
    eval_targets=("dense",),
    rule="none",
    learning_rate=0.01,
    warmup=0.0,
    weight_decay=5e-4,
    keep_pruned=True,
)

FIRST, SECOND = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def _half(base: ImageConfig) -> ImageConfig:
    """The first five classes."""
    data = dataclasses.replace(base.data, classes=FIRST)
    return dataclasses.replace(base, name=f"{base.name.split('_')[0]}_half", data=data)


def _transfer(
    base: ImageConfig, name: str, classes: tuple[int, ...], learning_rate: float = 0.01
) -> ImageConfig:
    """Further training under fixed masks, with a new head."""
    data = dataclasses.replace(base.data, classes=classes)
    return variant(
        dataclasses.replace(base, data=data, init_from="", new_head=True),
        name,
        eval_targets=("dense",),
        rule="none",
        learning_rate=learning_rate,
        warmup=0.0,
        keep_pruned=True,
    )


configs = (
    *(
        dataclasses.replace(
            _base,
            name=name,
            data=dataclasses.replace(_base.data, name=name, batch_size=64),
        )
        for name in TRANSFER_SETS
    ),
    _transfer(cifar10_small.config, "transfer_small", ()),
    _half(cifar10_small.config),
    _transfer(cifar10_small.config, "transfer_halves", SECOND),
    _half(digits.config),
    _transfer(
        digits.config,
        "transfer_digits",
        SECOND,
        learning_rate=digits.config.optimizer.learning_rate,
    ),
)
