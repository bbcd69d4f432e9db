"""Blocks of weights along the inputs that share a scale."""

import jax

from cram_jax.axes import Axes
from cram_jax.reshaping import crop, join_axes, pad_axis, split_axis


def blocked_axis(axes: Axes) -> int | None:
    """The axis that blocks run along.

    The last input axis, or the last output axis of a lookup table, whose rows are
    looked up; None if there is neither.
    """
    along = axes.outputs if axes.lookup else axes.inputs
    return along[-1] if along else None


def split_blocks(leaf: jax.Array, axis: int, block: int) -> jax.Array:
    """Cuts an axis into blocks, the last one padded with zeros.

    Args:
      leaf: an array.
      axis: at least 0.
      block: entries of a block.

    Returns:
      The array with two axes in place of the one: blocks and their entries.
    """
    return split_axis(pad_axis(leaf, axis, block), axis, block)


def join_blocks(split: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """Undoes `split_blocks`: the shape of ``like``."""
    padded = pad_axis(like, axis, split.shape[axis + 1])
    return crop(join_axes(split, padded), like)
