"""Counts of true entries, in loops that compile and run fast on CPU.

XLA on CPU compiles equal computations once. So what is done to each of many arrays is
the same for all of a shape: what differs is data, never a constant.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cram_jax.reshaping import explicit_sharding, shards, split_axis

# Parts into which an axis is cut, so that the devices that share it count separately.
# Not more, because XLA on CPU sums longer axes as a tree.
_PARTS = 32


def count_true(masks: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Counts the true entries of each mask.

    Args:
      masks: bool arrays of one shape.
      dtype: of the counts, an integer that can hold them.

    Returns:
      The counts, shape (masks,).
    """
    return jax.lax.platform_dependent(
        masks,
        cpu=partial(_count_in_one_loop, dtype=dtype),
        default=partial(_count_each, dtype=dtype),
    )


def _count_each(masks: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    return jnp.stack([jnp.sum(mask, dtype=dtype) for mask in masks])


def _count_in_one_loop(masks: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Counts in all masks at once, as XLA does on its own on GPU but not on CPU.

    There it computes each sum as a tree, many times slower than a plain loop; a
    reduction of many operands is one. It must not run over the axes that are sharded:
    XLA would gather its results.
    """
    cuts = [_cut_axes(mask) for mask in masks]
    counts = jax.lax.reduce(
        [cut.array.astype(dtype) for cut in cuts],
        [jnp.zeros([], dtype)] * len(masks),
        lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)],
        cuts[0].inner,
    )
    return jnp.sum(jnp.stack(counts), axis=range(1, counts[0].ndim + 1), dtype=dtype)


class _Cut(NamedTuple):
    """An array whose axes are cut in two.

    Attributes:
      array: (a, b) as (p, a / p, q, b / q), without the axes of size 1.
      inner: the axes of ``a / p`` and ``b / q``. Sums over them are local as long as
        the others hold the sharding.
    """

    array: jax.Array
    inner: tuple[int, ...]


def _cut_axes(array: jax.Array) -> _Cut:
    """Cuts each axis."""
    sharding = explicit_sharding(array)
    ranks: list[bool] = []  # of each axis, whether it is an inner one
    for axis in reversed(range(array.ndim)):
        size = array.shape[axis]
        number = _PARTS
        if not ranks:  # the innermost loop should not be too short
            number = max(8, min(number, 2 ** ((size // 32).bit_length() - 1)))
        if sharding is not None:
            number = math.lcm(number, shards(sharding, sharding.spec[axis]))
        parts = math.gcd(size, number)
        if 1 < parts < size:
            array = split_axis(array, axis, size // parts)
            ranks = [False, True, *ranks]
        else:
            ranks = [parts == 1, *ranks]
    return _Cut(array, tuple(axis for axis, is_inner in enumerate(ranks) if is_inner))


def places(array: jax.Array, start: jax.Array) -> jax.Array:
    """Numbers the entries of an array row by row, from ``start`` on.

    The start is added first, or XLA would hoist the rest out of a loop over starts and
    store it.
    """
    start += jnp.zeros_like(array, start.dtype, shape=())
    return jax.lax.platform_dependent(
        start,
        cpu=partial(_places_in_one_sequence, array=array),
        default=partial(_places_along_each_axis, array=array),
    )


def _places_along_each_axis(start: jax.Array, array: jax.Array) -> jax.Array:
    """Sums of one iota for each axis: they shard like the array."""
    numbers = jnp.full_like(array, start, start.dtype)
    stride = 1
    for axis in reversed(range(array.ndim)):
        numbers += stride * jax.lax.broadcasted_iota(start.dtype, array.shape, axis)
        stride *= array.shape[axis]
    return numbers


def _places_in_one_sequence(start: jax.Array, array: jax.Array) -> jax.Array:
    """One iota: XLA on CPU would compile the strides of each axis by themselves."""
    numbers = start + jax.lax.iota(start.dtype, array.size)
    return jax.lax.reshape(numbers, array.shape, out_sharding=explicit_sharding(array))


def unstack(vector: jax.Array) -> Sequence[jax.Array]:
    """The entries of a vector as scalars.

    On CPU by one reduction: XLA would fuse an index into whatever uses the entry, and
    no two would be equal.
    """
    return jax.lax.platform_dependent(vector, cpu=_unstack_in_one_loop, default=tuple)


def _unstack_in_one_loop(vector: jax.Array) -> tuple[jax.Array, ...]:
    one_hot = jnp.where(jnp.eye(vector.size, dtype=bool), vector, 0)
    return tuple(
        jax.lax.reduce(
            list(one_hot),
            [jnp.zeros([], vector.dtype)] * vector.size,
            lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)],
            [0],
        )
    )
