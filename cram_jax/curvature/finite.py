"""Non-finite statistics are an error: they must not decide what is pruned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Finite(NamedTuple):
    """Which statistics are finite.

    Attributes:
      before: bool, shape (leaves,): the weights that are pruned.
      gradients: bool, shape (gradients, leaves).
      after: bool, shape (leaves,): the remaining weights.
    """

    before: jax.Array
    gradients: jax.Array
    after: jax.Array


def all_finite(leaves: list[jax.Array]) -> jax.Array:
    """Bool, shape (leaves,): whether all entries of each are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def check_finite(finite: Finite, paths: list[str], examples_per_gradient: int) -> None:
    """Raises a ValueError that names the example and leaf unless all is finite.

    Args:
      finite: what is.
      paths: of the leaves.
      examples_per_gradient: over how many examples each gradient is averaged.
    """
    for path, is_finite in zip(paths, finite.before, strict=True):
        if not is_finite:
            raise ValueError(f"params[{path!r}] must be finite, got some that are not")
    bad = np.argwhere(~np.asarray(finite.gradients))
    if bad.size:
        number, leaf = bad[0]
        first = number * examples_per_gradient
        last = first + examples_per_gradient - 1
        examples = f"examples {first} to {last}" if last > first else f"example {first}"
        raise ValueError(
            f"loss_fn must have finite gradients, whose squares over damping can be "
            f"summed, but that of {examples} with respect to params[{paths[leaf]!r}] "
            f"is not finite or too large"
        )
    for path, is_finite in zip(paths, finite.after, strict=True):
        if not is_finite:
            raise ValueError(
                f"damping must be larger: the weights left in params[{path!r}] would "
                f"move beyond what their dtype holds"
            )
