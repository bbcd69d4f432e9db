"""ResNet-50 on ImageNet: figure 1 and tables 1 and 9 to 16 of the paper.

    python -m experiments train imagenet --data-dir DIRECTORY

DIRECTORY holds imagenet2012 as tensorflow-datasets prepares it.

- `imagenet`: CrAM+-Multi for 50, 70 and 90 %.
- `imagenet_k50`, `imagenet_k70`: CrAM+ for one sparsity.
- `imagenet_sgd`, twice as long, and `imagenet_sam`.
- `imagenet_uniform`: 50, 70 and 90 % of every layer but the first and the last, which
  stay dense as in the authors' code (appendix C.4).
- `imagenet_nm`: CrAM+-N:M, 2:4 or 4:8 with equal chance (tables 10, 13 and 14).
- `imagenet_infrequent`: each of the three targets keeps its own masks and computes new
  ones at every 20th use (appendix C.6, table 15); other intervals:
  ``--optimizer.masks-every 100``.
- `imagenet_4bit`: CrAM+ for 4 bits; `imagenet_4bit_multi`: for 4 bits with or without
  pruning by 50 or 70 % before (table 16).

From the paper: the methods, 100 epochs, sparse gradients. From the authors'
configurations, where the text leaves it out: SGD with momentum 0.9, learning rate 0.2,
weight decay 1e-4, batches of 512, 5 epochs of warm-up, then a cosine to 0, rho 0.05.
Neither gives the radius of SAM: 0.05 is that of its own paper (Foret et al., 2021).
bfloat16 activations are our choice; ``--model.dtype float32`` changes it.
"""

from experiments.config import OptimizerConfig, variant
from experiments.images.config import DataConfig, ImageConfig, ModelConfig

config = ImageConfig(
    name="imagenet",
    data=DataConfig(
        name="imagenet2012", batch_size=512, shift=0, flip=True, evaluation_batch=250
    ),
    model=ModelConfig(name="resnet50", dtype="bfloat16"),
    optimizer=OptimizerConfig(
        rule="cram_plus",
        train_targets=("k50", "k70", "k90"),
        rho=0.05,
        learning_rate=0.2,
        warmup=5 / 100,
        weight_decay=1e-4,
    ),
    epochs=100,
    eval_targets=(
        *("dense", "k50", "k60", "k70", "k80", "k90", "u50", "u80", "u90"),
        *("2:4", "4:8", "4bit"),
    ),
    log_every=100,
)

_quantized = ("dense", "4bit", "8bit", "k50+4bit", "k70+4bit", "k80+4bit", "k90+4bit")
four_bits = variant(
    config, "imagenet_4bit", eval_targets=_quantized, train_targets=("4bit",)
)

configs = (
    config,
    variant(config, "imagenet_k50", train_targets=("k50",)),
    variant(config, "imagenet_k70", train_targets=("k70",)),
    variant(config, "imagenet_sgd", epochs=200, rule="none", warmup=5 / 200),
    variant(config, "imagenet_sam", rule="sam", rho=0.05),
    variant(
        config,
        "imagenet_uniform",
        eval_targets=("dense", "u50", "u70", "u80", "u90", "k80", "k90"),
        train_targets=("u50", "u70", "u90"),
    ),
    variant(config, "imagenet_nm", train_targets=("2:4", "4:8")),
    variant(config, "imagenet_infrequent", masks_every=20),
    four_bits,
    variant(
        four_bits, "imagenet_4bit_multi", train_targets=("4bit", "k50+4bit", "k70+4bit")
    ),
)
