"""Blocks of weights that are kept or removed together."""

import math
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.projector import apply_masks
from cram_jax.reshaping import join_axes, split_axis

Block: TypeAlias = tuple[int | EllipsisType | None, ...]
"""Shape of a block along the last axes of a leaf, see `cram_jax.top_k`."""

Compress: TypeAlias = Callable[
    [Sequence[jax.Array]], Sequence[tuple[jax.Array, jax.Array]]
]
"""From leaves to one ``(values, mask)`` each."""


def by_block(compress: Compress, block: Block) -> Compress:
    """Makes a function that prunes single weights prune blocks of them.

    Args:
      compress: prunes by magnitude. It sees the root mean square of every block, in
        float32 at least, and only of leaves that the block divides.
      block: the shape of a block.

    Returns:
      The function; leaves that the block does not divide stay as they are.
    """

    def compress_blocks(
        leaves: Sequence[jax.Array],
    ) -> list[tuple[jax.Array, jax.Array]]:
        cuts = [_cut(jnp.shape(leaf), block) for leaf in leaves]
        if not any(cuts):
            raise ValueError(
                f"block={block} divides no prunable leaf, got shapes "
                f"{[jnp.shape(leaf) for leaf in leaves]}"
            )
        masks = iter(
            mask
            for _, mask in compress(
                [_rms(leaf, cut) for leaf, cut in zip(leaves, cuts, strict=True) if cut]
            )
        )
        pairs = []
        for leaf, cut in zip(leaves, cuts, strict=True):
            if cut is None:
                pairs.append((leaf, jnp.ones_like(leaf, dtype=bool)))
                continue
            mask = join_axes(jnp.broadcast_to(next(masks), cut), leaf)
            pairs.append((apply_masks(mask, leaf), mask))
        return pairs

    return compress_blocks


def check_block(block: Block) -> None:
    """Raises a ValueError unless it is the shape of a block."""
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


def _is_positive(side: object) -> bool:
    is_integer = isinstance(side, int | np.integer) and not isinstance(side, bool)
    return is_integer and side >= 1  # type: ignore[operator]


def _cut(shape: tuple[int, ...], block: Block) -> tuple[int, ...] | None:
    """Each axis as two, blocks and places in a block; None if it cannot be cut."""
    whole = block[0] is ...
    sides = block[1:] if whole else block
    before = len(shape) - len(sides)
    if before < 0:
        return None
    every = [*(shape[:before] if whole else [1] * before), *sides]
    cut: list[int] = []
    for size, side in zip(shape, every, strict=True):
        inside = size if side is None else int(side)
        if inside == 0 or size % inside:
            return None
        cut += [size // inside, inside]
    return tuple(cut)


def _rms(leaf: jax.Array, cut: tuple[int, ...]) -> jax.Array:
    """Root mean square of each block; the axes inside a block have length 1."""
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    for axis in reversed(range(leaf.ndim)):
        wide = split_axis(wide, axis, cut[2 * axis + 1])
    inside = tuple(range(1, len(cut), 2))
    squares = jnp.sum(wide**2, axis=inside, keepdims=True)
    return jnp.sqrt(squares / math.prod(cut[1::2]))
