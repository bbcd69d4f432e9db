"""ResNet-50 on ImageNet: figure 1 and tables 1, 9, 11 and 12 of the paper.

    python -m experiments train imagenet --data-dir DIRECTORY

DIRECTORY holds imagenet2012 as tensorflow-datasets prepares it.

- `imagenet`: CrAM+-Multi for 50, 70 and 90 %.
- `imagenet_k50`, `imagenet_k70`: CrAM+ for one sparsity.
- `imagenet_sgd`, twice as long, and `imagenet_sam`.

From the paper: the methods, 100 epochs, sparse gradients. From the authors'
configurations, where the text leaves it out: SGD with momentum 0.9, learning rate 0.2,
weight decay 1e-4, batches of 512, 5 epochs of warm-up, then a cosine to 0, rho 0.05.
Neither gives the radius of SAM: 0.05 is that of its own paper (Foret et al., 2021).
bfloat16 activations are our choice; ``--model.dtype float32`` changes it.
"""

from experiments.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    variant,
)

config = Config(
    name="imagenet",
    data=DataConfig(
        name="imagenet2012", batch_size=512, shift=0, flip=True, evaluation_batch=250
    ),
    model=ModelConfig(name="resnet50", dtype="bfloat16"),
    optimizer=OptimizerConfig(
        method="cram_plus",
        targets=("k50", "k70", "k90"),
        rho=0.05,
        learning_rate=0.2,
        warmup=5 / 100,
        weight_decay=1e-4,
    ),
    epochs=100,
    targets=(
        *("dense", "k50", "k60", "k70", "k80", "k90", "u50", "u80", "u90"),
        *("2:4", "4:8", "4bit"),
    ),
    log_every=100,
)

configs = (
    config,
    variant(config, "imagenet_k50", targets=("k50",)),
    variant(config, "imagenet_k70", targets=("k70",)),
    variant(config, "imagenet_sgd", epochs=200, method="sgd", warmup=5 / 200),
    variant(config, "imagenet_sam", method="sam", rho=0.05),
)
