"""Projectors for 4-bit floating point with a scale for every few inputs."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from cram_jax.axes import Axes, AxesLike, axes_value
from cram_jax.leaves import Leaf, Where, where_value
from cram_jax.projector import safe_denominator
from cram_jax.quantization.blocks import blocked_axis, join_blocks, split_blocks
from cram_jax.quantization.floats import round_e2m1, round_e4m3
from cram_jax.quantization.rounding import RoundingProjector

_LARGEST = 6.0  # of E2M1
_LARGEST_SCALE = 448.0  # of E4M3


def mxfp4(*, where: Where | None = None, axes: AxesLike | None = None) -> "Mxfp4":
    """Rounds weights to MXFP4: E2M1 numbers with a power of two for every 32 inputs.

    A weight becomes the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and minus those (half to
    even), times ``2**(floor(log2(m)) - 2)`` with the largest magnitude m of its block.
    Blocks run along the last input axis, or along the rows of a lookup table; the last
    one may be shorter. Zero stays zero. The result stays in the leaf's dtype; gradients
    pass through as if nothing had been rounded; the masks are all True.

    Args:
      where: which leaves, see `prunable`.
      axes: what is known of the axes, see `axes_of`.

    Returns:
      A projector.

    Raises:
      ValueError: at ``init``, if ``where`` chooses no leaf.
      TypeError: ``where`` or ``axes`` is neither a function nor a tree of the right
        leaves; at ``init``, if a leaf to quantise is not of a floating dtype.

    Example:
      >>> kernel = jnp.array([[5.2], [-0.7], [0.1], [2.4]])
      >>> compress([kernel], mxfp4()).params[0].ravel()
      Array([ 6. , -0.5,  0. ,  2. ], dtype=float32)

    Reference: OCP Microscaling Formats (MX) Specification 1.0, section 6.3.
    """
    return Mxfp4(where=where_value(where), axes=axes_value(axes))


def nvfp4(*, where: Where | None = None, axes: AxesLike | None = None) -> "Nvfp4":
    """Rounds weights to NVFP4: E2M1 numbers with an E4M3 scale for every 16 inputs.

    With the largest magnitude M of a layer, and m of a block of 16 inputs, the layer's
    scale is ``t = M / (6 * 448)`` and the block's ``s``, the E4M3 number nearest to
    ``m / (6 t)``; a weight becomes an E2M1 number (see `mxfp4`) times ``s`` times
    ``t``. Blocks, zeros, dtypes, gradients and masks are as in `mxfp4`.

    Args:
      where: which leaves, see `prunable`.
      axes: what is known of the axes, see `axes_of`.

    Returns:
      A projector.

    Raises:
      ValueError: at ``init``, if ``where`` chooses no leaf.
      TypeError: ``where`` or ``axes`` is neither a function nor a tree of the right
        leaves; at ``init``, if a leaf to quantise is not of a floating dtype.

    Example:
      >>> kernel = jnp.array([[10.5], [-0.7], [0.1], [2.4]])
      >>> compress([kernel], nvfp4()).params[0].ravel()
      Array([10.5  , -0.875,  0.   ,  2.625], dtype=float32)

    Reference: Pretraining Large Language Models with NVFP4, arXiv 2509.25149, app. B.
    """
    return Nvfp4(where=where_value(where), axes=axes_value(axes))


@dataclass(frozen=True, repr=False)
class _Microscaled(RoundingProjector):
    """What the formats share: blocks."""

    _: KW_ONLY
    where: Any = None
    axes: Any = None

    block: ClassVar[int]

    def obstacle(self, leaf: Leaf) -> str:
        """Says so if there is nothing for blocks to run along."""
        return "it has no inputs" if blocked_axis(leaf.axes) is None else ""

    def round_leaf(self, wide: jax.Array, axes: Axes) -> jax.Array:
        """To the numbers of each block; in float32, as the formats are defined."""
        axis = blocked_axis(axes)
        assert axis is not None
        wide = wide.astype(jnp.float32)
        over = tuple(i for i in range(wide.ndim) if i not in axes.stack)
        layer = jnp.max(jnp.abs(wide), over, keepdims=True, initial=0)
        split = split_blocks(wide, axis, self.block)
        largest = jnp.max(jnp.abs(split), axis + 1, keepdims=True, initial=0)
        rounded = self.round_blocks(split, largest, jnp.expand_dims(layer, axis + 1))
        return join_blocks(rounded, wide, axis)

    def round_blocks(
        self, split: jax.Array, largest: jax.Array, layer: jax.Array
    ) -> jax.Array:
        """Rounds blocks, given the largest magnitudes of each and of its layer."""
        raise NotImplementedError


class Mxfp4(_Microscaled):
    """See `mxfp4`."""

    block = 32

    def round_blocks(
        self, split: jax.Array, largest: jax.Array, layer: jax.Array
    ) -> jax.Array:
        """See `mxfp4`."""
        del layer
        _, exponent = jnp.frexp(largest)  # one more than floor(log2)
        # Float32 has no smaller power of two without losing digits.
        scale = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 3, -126))
        # The format's scale has no infinity, but a NaN.
        scale = jnp.where(jnp.isfinite(largest), scale, jnp.nan)
        return round_e2m1(split / scale) * scale


class Nvfp4(_Microscaled):
    """See `nvfp4`."""

    block = 16

    def round_blocks(
        self, split: jax.Array, largest: jax.Array, layer: jax.Array
    ) -> jax.Array:
        """See `nvfp4`."""
        whole = safe_denominator(layer / (_LARGEST * _LARGEST_SCALE))
        scale = round_e4m3(largest / _LARGEST / whole)
        return round_e2m1(split / safe_denominator(scale * whole)) * scale * whole
