"""Transfer of pruned networks to other data sets: figure 2 of the paper.

    python -m experiments train transfer_food101 --init-from MODEL --data-dir DIRECTORY

MODEL is a compressed model, from ``compress runs/imagenet-cram_plus-seed0 --target
k80``. Its masks stay as they are, its classification layer is drawn anew, and all kept
weights train on. The twelve data sets are in `experiments.images.catalogue`. A dense
model transfers in the same way.

From the paper: fixed masks and a new classification layer. Neither its text nor the
authors' configurations gave us the rest. The data sets are those of Iofinova et al.
(2022), by two of the paper's authors; 150 epochs of SGD with batches of 64, learning
rate 0.01 and weight decay 5e-4 follow Salman et al. (2020), with our cosine in place of
their steps.

`transfer_small` tries it on a compressed `cifar10_small`, whose classes it learns anew.
"""

import dataclasses

from experiments.config import variant
from experiments.images.catalogue import TRANSFER_SETS
from experiments.recipes import cifar10_small, imagenet

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

_small = variant(
    dataclasses.replace(cifar10_small.config, init_from="", new_head=True),
    "transfer_small",
    eval_targets=("dense",),
    rule="none",
    learning_rate=0.01,
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
    _small,
)
