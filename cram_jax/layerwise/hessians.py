"""The damped second derivatives of a layer's error."""

import jax
import jax.numpy as jnp

from cram_jax.projector import safe_denominator


def hessian(gram: jax.Array, damping: float) -> jax.Array:
    """The products of a layer's inputs, made positive definite.

    Divided by the mean of the diagonal, so that the damping is relative to it. An input
    that is always 0 does not matter and gets 1.

    Args:
      gram: (inputs, inputs).
      damping: added to the diagonal.
    """
    diagonal = jnp.diagonal(gram)
    mean = safe_denominator(jnp.mean(diagonal))
    added = jnp.where(diagonal == 0, 1, damping).astype(gram.dtype)
    return gram / mean + jnp.diag(added)
