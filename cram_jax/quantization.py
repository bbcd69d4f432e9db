"""Projectors that round weights to few levels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.projector import Params, Projection, Projector, stateless
from cram_jax.prunable import Where, project_prunable


def fake_quant(bits: int, *, where: Where | None = None) -> Projector:
    """Rounds weights to the values that ``bits``-wide integers can hold, with a scale.

    Symmetric: each output channel (the last axis of a Flax kernel) has the scale
    ``max|w| / (2**(bits - 1) - 1)`` and at most ``2**bits - 1`` levels, zero among
    them; a leaf of fewer than two dimensions has one scale. Rounding is to nearest,
    half to even. The result stays in the leaf's dtype, and gradients pass through as if
    nothing had been rounded. The masks are all True.

    Args:
      bits: width of the integers, 2 <= bits <= 16.
      where: which leaves, see `prunable`; by default those of two or more dimensions.

    Returns:
      A projector.

    Raises:
      ValueError: bits out of range; at ``init``, if ``where`` chooses no leaf.
      TypeError: bits is not an integer; at ``init``, if a leaf to quantise is not of a
        floating dtype.

    Example:
      >>> params = [jnp.array([[0.1], [-0.7], [0.32]])]
      >>> compress(params, fake_quant(4)).params[0].ravel()
      Array([ 0.1, -0.7,  0.3], dtype=float32)

    Reference: Peste et al., CrAM, ICLR 2023, table 16, arXiv 2207.14200.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer):
        raise TypeError(f"bits must be an integer, got {bits!r}")
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be between 2 and 16, got {bits}")

    def compress(leaves: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
        return [
            (_round_channels(leaf, 2 ** (bits - 1) - 1), jnp.ones_like(leaf, bool))
            for leaf in leaves
        ]

    def project(params: Params, key: jax.Array | None) -> Projection:
        del key
        return project_prunable(params, where, compress)

    return stateless(project, f"fake_quant({bits})")


def _round_channels(leaf: jax.Array, largest: int) -> jax.Array:
    # bfloat16 cannot hold the ratio w / scale to the nearest of 255 levels.
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    axes = tuple(range(leaf.ndim - 1)) if leaf.ndim >= 2 else None
    scale = jnp.max(jnp.abs(wide), axis=axes, keepdims=True) / largest
    scale = jnp.where(scale == 0, 1, scale)
    levels = jnp.clip(jnp.round(wide / scale), -largest, largest)
    rounded = jax.lax.stop_gradient((levels * scale).astype(leaf.dtype))
    return rounded + (leaf - jax.lax.stop_gradient(leaf))
