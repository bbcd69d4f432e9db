"""Blocks of weights that are kept or removed together."""

import math
from types import EllipsisType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.axes import Axes
from cram_jax.projector import widened
from cram_jax.reshaping import crop, join_axes, pad_axis, split_axis
from cram_jax.scaling import power_of_two

Block: TypeAlias = tuple[int | EllipsisType | None, ...]
"""Shape of a block of inputs x outputs, see `cram_jax.top_k`."""

Sides: TypeAlias = tuple[int, ...]
"""How many entries of each axis of a leaf a block holds."""


def block_value(block: Any) -> Block:
    """The shape of a block, checked."""
    sides = block[1:] if isinstance(block, tuple) and block[:1] == (...,) else block
    if (
        not isinstance(sides, tuple)
        or not sides
        or not all(side is None or _is_positive(side) for side in sides)
    ):
        raise ValueError(
            f"block must be a tuple of integers of at least 1 or None for a whole "
            f"axis, perhaps after a leading ..., such as (1, 4) or (..., 1), got "
            f"{block!r}"
        )
    whole = (...,) if sides is not block else ()
    return (*whole, *(None if side is None else int(side) for side in sides))


def _is_positive(side: object) -> bool:
    is_integer = isinstance(side, int | np.integer) and not isinstance(side, bool)
    return is_integer and side >= 1  # type: ignore[operator]


def sides_of_block(
    shape: tuple[int, ...], axes: Axes, block: Block, *, pad: bool
) -> Sides | str:
    """How many entries of each axis a block holds, or why the leaf cannot be cut.

    Args:
      shape: of the leaf.
      axes: their roles.
      block: the shape of a block.
      pad: whether blocks may reach over the edge.
    """
    if not axes.inputs or not axes.outputs:
        return f"it has no {'outputs' if axes.inputs else 'inputs'} to cut into blocks"
    if 0 in shape:
        return "it has no entries"
    parts = [*((axis,) for axis in axes.windows), axes.inputs, axes.outputs]
    whole = block[0] is ...
    sides = block[1:] if whole else block
    before = len(parts) - len(sides)
    if before < 0:
        return f"it has fewer than {len(sides)} axes to cut into blocks"
    found = [1] * len(shape)
    every = [*[None if whole else 1] * before, *sides]
    for part, side in zip(parts, every, strict=True):
        sizes = [shape[axis] for axis in part]
        inside = side if isinstance(side, int) else math.prod(sizes)
        cut = _cut(sizes, inside, pad)
        if cut is None:
            return f"{inside} does not divide its {'x'.join(map(str, sizes))} " + (
                "inputs"
                if part == axes.inputs
                else "outputs"
                if part == axes.outputs
                else "windows"
            )
        for axis, own in zip(part, cut, strict=True):
            found[axis] = own
    return tuple(found)


def _cut(sizes: list[int], side: int, pad: bool) -> list[int] | None:
    """The side of a block along axes that count as one, the last varying fastest."""
    cut: list[int] = []
    for size in reversed(sizes):
        inside = min(side, size)
        if not pad and max(side, size) % inside:
            return None
        cut.insert(0, inside)
        side = side // size if side % size == 0 else 1
    return cut if side == 1 or pad else None


def block_scores(leaf: jax.Array, sides: Sides) -> jax.Array:
    """Root mean square of each block, over the entries it has, in at least float32.

    Args:
      leaf: of any shape.
      sides: from `sides_of_block`.

    Returns:
      One entry for each block, with the axes of the leaf.
    """
    wide = _padded(widened(jax.lax.stop_gradient(leaf)), sides)
    for axis in reversed(range(leaf.ndim)):
        wide = split_axis(wide, axis, sides[axis])
    over = tuple(range(1, wide.ndim, 2))
    # Relative to a power of two, which changes no digit, squares stay in range.
    unit = power_of_two(jnp.max(jnp.abs(wide), axis=over, keepdims=True))
    squares = jnp.sum(jnp.square(wide * (1 / unit)), axis=over)
    for axis, (size, side) in enumerate(zip(leaf.shape, sides, strict=True)):
        inside = np.minimum(side, size - side * np.arange(-(-size // side)))
        along = [-1 if other == axis else 1 for other in range(leaf.ndim)]
        squares = squares / inside.reshape(along).astype(squares.dtype)
    return jnp.sqrt(squares) * jnp.squeeze(unit, over)


def spread_over_blocks(mask: jax.Array, leaf: jax.Array, sides: Sides) -> jax.Array:
    """From a mask with an entry for each block to one for each entry of the leaf."""
    padded = _padded(leaf, sides)
    cut: list[int] = []
    for size, side in zip(mask.shape, sides, strict=True):
        cut += [size, side]
    mask = jnp.expand_dims(mask, tuple(range(1, 2 * leaf.ndim, 2)))
    mask = join_axes(jnp.broadcast_to(mask, cut), padded)
    return crop(mask, leaf)


def _padded(leaf: jax.Array, sides: Sides) -> jax.Array:
    for axis, side in enumerate(sides):
        leaf = pad_axis(leaf, axis, side)
    return leaf
