"""ResNet-50 on ImageNet with masks that serve for many steps: table 15 of the paper.

    python -m experiments train imagenet_infrequent --data-dir DIRECTORY

Appendix C.6: each of the three targets keeps its own masks and computes new ones at
every 20th use. The rest is that of `imagenet`. Other intervals:
``--optimizer.masks-every 100``.
"""

from experiments.config import variant
from experiments.configs import imagenet

configs = (variant(imagenet.config, "imagenet_infrequent", masks_every=20),)
