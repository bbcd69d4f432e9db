"""ResNet-20 on CIFAR-10 with CrAM+-Multi: table 6 of the paper, sized for one GPU.

    python -m experiments train cifar10 --data-dir DIRECTORY

DIRECTORY holds the data set as tensorflow-datasets prepares it. The numbers are
those of the authors' configuration for high sparsity: 200 epochs, 5 of them warm-up,
rho 0.15.
No figures of ours are published for this run yet.
"""

from experiments.config import Config, DataConfig, ModelConfig, OptimizerConfig

config = Config(
    name="cifar10",
    data=DataConfig(
        name="cifar10", batch_size=128, shift=4, flip=True, evaluation_batch=500
    ),
    model=ModelConfig(name="resnet20"),
    optimizer=OptimizerConfig(
        method="cram_plus",
        targets=("k50", "k70", "k80", "k90", "k95"),
        rho=0.15,
        learning_rate=0.1,
        warmup=5 / 200,
        weight_decay=5e-4,
    ),
    epochs=200,
    targets=("dense", "k50", "k70", "k80", "k90", "k95", "2:4", "4bit"),
    log_every=100,
)
