"""ResNet-50 on ImageNet, quantised to 4 bits: table 16 of the paper.

    python -m experiments train imagenet_4bit --data-dir DIRECTORY

- `imagenet_4bit`: CrAM+ for 4 bits.
- `imagenet_4bit_multi`: for 4 bits, alone or after pruning by 50 or 70 %.

The text gives no further numbers; the rest is that of `imagenet`.
"""

from experiments.config import variant
from experiments.configs import imagenet

_targets = ("dense", "4bit", "8bit", "k50+4bit", "k70+4bit", "k80+4bit", "k90+4bit")
_base = variant(imagenet.config, "imagenet_4bit", evaluate=_targets, targets=("4bit",))

configs = (
    _base,
    variant(_base, "imagenet_4bit_multi", targets=("4bit", "k50+4bit", "k70+4bit")),
)
