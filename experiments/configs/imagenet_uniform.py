"""ResNet-50 on ImageNet, the same sparsity in every layer: appendix C.4 of the paper.

    python -m experiments train imagenet_uniform --data-dir DIRECTORY

CrAM+-Multi for 50, 70 and 90 % of every layer but the first and the last, which stay
dense as in the authors' code. The rest is that of `imagenet`.
"""

from experiments.config import variant
from experiments.configs import imagenet

configs = (
    variant(
        imagenet.config,
        "imagenet_uniform",
        evaluate=("dense", "u50", "u70", "u80", "u90", "k80", "k90"),
        targets=("u50", "u70", "u90"),
    ),
)
