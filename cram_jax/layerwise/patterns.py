"""What is kept: a share of the weights, or n of every m."""

from typing import TypeAlias

from cram_jax.leaves import LeafProjector
from cram_jax.magnitude import n_m, top_k
from cram_jax.sparsity import Number, check_sparsity

Pattern: TypeAlias = Number | tuple[int, int]
"""A share of zeros, or (n, m): n of every m consecutive inputs are kept."""


def chooser(pattern: Pattern) -> LeafProjector:
    """A function that keeps the largest entries of each layer by a pattern.

    Raises:
      ValueError: the share is out of range, or n is not between 1 and m.
      TypeError: it is neither a number nor two integers.
    """
    if isinstance(pattern, tuple):
        if len(pattern) != 2:
            raise ValueError(
                f"sparsity, if not a number, must be (n, m), got {pattern!r}"
            )
        return n_m(*pattern)
    check_sparsity(pattern)
    return top_k(pattern, scope="layer")
