"""ResNet-50 on ImageNet with CrAM+-N:M: tables 10, 13 and 14 of the paper.

    python -m experiments train imagenet_nm --data-dir DIRECTORY

From the authors' configuration: 2:4 or 4:8 with equal chance. The rest is that of
`imagenet`.
"""

from experiments.config import variant
from experiments.configs import imagenet

configs = (variant(imagenet.config, "imagenet_nm", targets=("2:4", "4:8")),)
