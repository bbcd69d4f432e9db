"""Iterative magnitude pruning with rewinding: lottery tickets."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cram_jax import Projection, compress, top_k

Train = Callable[[Any, Any], Any]


def lottery_tickets(
    early: Any, train: Train, levels: int, *, share: float = 0.2, **options: Any
) -> Iterator[Projection]:
    r"""Trains, prunes a fifth of what is left, rewinds, and again.

    Level :math:`i` has a sparsity of :math:`1 - 0.8^i`. Each level costs a whole
    training.

    Args:
      early: the parameters to rewind to, of step 0 or soon after.
      train: ``(params, masks) -> params``, from the rewound parameters to trained ones,
        with `cram_jax.keep_pruned` of the masks at the end of the chain; with
        `cram_jax.sam` in it, it is "Train flat, then compress".
      levels: how many.
      share: of the kept weights that a level prunes.
      **options: of `cram_jax.top_k`, such as ``where``.

    Yields:
      For each level, the trained parameters and their masks, the dense ones first.

    Example:
      >>> early = [jnp.array([[1.0, 2.0, 3.0, 4.0]])]
      >>> double = lambda params, masks: jax.tree.map(lambda leaf: 2 * leaf, params)
      >>> for params, _ in lottery_tickets(early, double, 2, share=0.5):
      ...     print(params[0])
      [[2. 4. 6. 8.]]
      [[0. 0. 6. 8.]]
      [[0. 0. 0. 8.]]

    References: Frankle and Carbin, The lottery ticket hypothesis, ICLR 2019, arXiv
      1803.03635; Na et al., Train flat, then compress, 2022, arXiv 2205.12694.
    """
    masks = optax.tree.ones_like(early, dtype=bool)
    for level in range(levels + 1):
        start = jax.tree.map(lambda m, leaf: jnp.where(m, leaf, 0), masks, early)
        trained = train(start, masks)
        yield Projection(trained, masks)
        _, masks = compress(trained, top_k(1 - (1 - share) ** (level + 1), **options))
