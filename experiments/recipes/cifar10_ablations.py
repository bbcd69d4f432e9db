"""ResNet-20 on CIFAR-10, one thing left out at a time: tables 7 and 8 of the paper.

    python -m experiments train cifar10_multi_dense_gradients --data-dir DIRECTORY

In addition to `cifar10_multi`, with its sparsities and other settings:

- `cifar10_k50`, `cifar10_k70`, `cifar10_k90`: trained for one sparsity.
- `cifar10_multi_cram`: equation 2, without the dense gradient of equation 4.
- `cifar10_multi_dense_gradients`: the compressed gradient of all weights, not
  only of the kept ones (3.3, C.2).
- `cifar10_multi_normalized`: the ascent along the gradient divided by its norm (A.1).
- `cifar10_multi_topk`: no ascent, rho 0.

The paper gives no settings for these runs beyond those of table 17.
"""

from experiments.config import variant
from experiments.recipes import cifar10

_base = cifar10.multi

configs = (
    *(
        variant(_base, f"cifar10_{target}", train_targets=(target,))
        for target in ("k50", "k70", "k90")
    ),
    variant(_base, "cifar10_multi_cram", rule="cram"),
    variant(_base, "cifar10_multi_dense_gradients", sparse_gradients=False),
    variant(_base, "cifar10_multi_normalized", normalize=True),
    variant(_base, "cifar10_multi_topk", rule="topk_plus"),
)
