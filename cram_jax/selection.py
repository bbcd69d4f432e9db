"""The k largest magnitudes over a set of arrays, exactly, by counting.

Finite magnitudes order like their bit patterns, so the threshold is found digit by
digit: count the entries below each candidate and keep the largest candidate that has
few enough below it. Nothing is sorted or gathered; arrays may be sharded along any
axes, and the devices exchange counts.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.reshaping import explicit_sharding, join_axes, shards, split_axis

# Bits settled by one pass over the data, which counts for 2**3 - 1 candidates. Seven
# counts and the candidates just fit the registers of a CPU.
_DIGIT = 3

# Parts into which an axis is cut, so that the devices that share it count on their own.
# Not more, because XLA on CPU sums longer axes as a tree.
_PARTS = 32

_INT32_ENTRIES = 2**31 - 1

Arrays: TypeAlias = Sequence[jax.Array]
Predicate: TypeAlias = Callable[[Arrays, jax.Array], list[jax.Array]]
"""From arrays and a candidate to bool arrays: which entries lie below it."""


def keep_largest(
    arrays: Sequence[jax.Array], k: int | jax.Array, *, signed: bool = False
) -> tuple[jax.Array, ...]:
    """Marks the k entries of largest magnitude over all arrays together.

    With ``signed`` it is the largest values, so that -3 is less than 1.

    Exactly ``k`` are marked, whatever the dtype. Equal magnitudes: the entry that comes
    first is marked, in the order of the arrays and then row by row. NaN counts as
    larger than infinity. Arrays of different dtypes are compared in their common one.

    Works under ``jit`` (``k`` may be traced), ``vmap`` and control flow, and on arrays
    that are sharded with automatic or explicit axes. At most 12 passes over float32, 6
    over bfloat16. Arrays of equal shape are first copied into one, which XLA compiles
    several times faster than a loop for each.

    Args:
      arrays: floating-point arrays of any shapes.
      k: how many to mark, an integer scalar; below 0 counts as 0, above the number of
        entries as all of them.
      signed: whether to compare values instead of magnitudes.

    Returns:
      One bool array for each array, of its shape.

    Raises:
      TypeError: an array is not of a floating dtype.
      ValueError: there are 2**31 entries or more, and 64-bit integers are disabled.

    Example:
      >>> keep_largest([jnp.array([1.0, -3.0]), jnp.array([3.0, 2.0])], 2)
      (Array([False,  True], dtype=bool), Array([ True, False], dtype=bool))
      >>> keep_largest([jnp.array([1.0, -3.0]), jnp.array([3.0, 3.0])], 2)
      (Array([False,  True], dtype=bool), Array([ True, False], dtype=bool))
      >>> keep_largest([jnp.array([1.0, -3.0, 2.0])], 2, signed=True)
      (Array([ True, False,  True], dtype=bool),)
    """
    for index, array in enumerate(arrays):
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise TypeError(
                f"arrays[{index}] has dtype {jnp.result_type(array).name}, expected a "
                f"floating dtype"
            )
    total = sum(jnp.size(array) for array in arrays)
    if total > _INT32_ENTRIES and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"arrays hold {total} entries, expected at most {_INT32_ENTRIES} unless "
            f"64-bit integers are enabled: jax.config.update('jax_enable_x64', True)"
        )
    return _keep_largest(tuple(map(jnp.asarray, arrays)), k, signed=bool(signed))


def magnitude_key(array: jax.Array) -> jax.Array:
    """Integers from 0 in the order of the magnitudes of a floating-point array.

    They are signed, because CPUs compare vectors of signed integers in one instruction.
    """
    bits = jnp.dtype(f"int{8 * array.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(array, bits) & jnp.iinfo(bits).max


def value_key(array: jax.Array) -> jax.Array:
    """Signed integers in the order of the values of a floating-point array.

    Both zeros give 0, and every NaN the same number above infinity's. None is the
    smallest integer.
    """
    array = jnp.where(array == 0, jnp.zeros_like(array), array)
    array = jnp.where(jnp.isnan(array), jnp.full_like(array, jnp.nan), array)
    bits = jax.lax.bitcast_convert_type(array, f"int{8 * array.dtype.itemsize}")
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


@partial(jax.jit, static_argnames="signed")
def _keep_largest(
    arrays: tuple[jax.Array, ...], k: int | jax.Array, *, signed: bool
) -> tuple[jax.Array, ...]:
    if not arrays:
        return ()
    key = value_key if signed else magnitude_key
    total = sum(array.size for array in arrays)
    integer = jnp.int64 if total > _INT32_ENTRIES else jnp.int32
    k = jnp.clip(k, 0, total).astype(integer)
    dtype = jnp.result_type(*arrays)
    arrays = tuple(array.astype(dtype) for array in arrays)
    groups = _group_alike(arrays)
    stacks = [_split_axes(jnp.stack([arrays[i] for i in group])) for group in groups]

    def is_smaller(stacks: Arrays, candidate: jax.Array) -> list[jax.Array]:
        return [key(stack) < candidate for stack in stacks]

    width = 8 * dtype.itemsize - 1
    start = jnp.zeros([], f"int{width + 1}")
    if signed:  # the first bit: whether the threshold is negative
        (negative,) = _count(is_smaller, stacks, [start], integer)
        lowest = -jnp.iinfo(start.dtype).max
        start = jnp.where(negative <= total - k, start, lowest)
    threshold = _radix_select(is_smaller, stacks, total - k, start, width)

    # Of the entries that equal the threshold the first ones are kept, as many as are
    # missing: all of some arrays, the first ones of one at most, none of the others.
    counts = _count_true(
        [
            [key(stack) > threshold for stack in stacks],
            [key(stack) == threshold for stack in stacks],
        ],
        integer,
    )
    in_order = np.argsort(np.concatenate(groups))
    larger, equal = jnp.concatenate(counts, axis=1)[:, in_order]
    before = jnp.cumsum(equal, dtype=integer) - equal
    missing = k - jnp.sum(larger, dtype=integer) - before
    is_cut = (missing > 0) & (missing < equal)

    def is_earlier_tie(arrays: Arrays, place: jax.Array) -> list[jax.Array]:
        return [
            (key(array) == threshold)
            & jnp.any(is_cut[np.array(group)])
            & (_places(array, -place) < 0)
            for array, group in zip(arrays, groups, strict=True)
        ]

    def first_ties(arrays: Arrays) -> list[jax.Array]:
        width = max(array.size for array in arrays).bit_length()
        number = jnp.sum(jnp.where(is_cut, missing, 0), dtype=integer)
        start = jnp.zeros([], integer)
        end = _radix_select(is_earlier_tie, arrays, number, start, width)
        return is_earlier_tie(arrays, end)

    ties = jax.lax.cond(
        jnp.any(is_cut),
        first_ties,
        lambda arrays: [key(array) > threshold for array in arrays],
        [
            jax.lax.dynamic_index_in_dim(stack, jnp.argmax(is_cut[np.array(group)]))
            for stack, group in zip(stacks, groups, strict=True)
        ],
    )
    ties_of = {index: ties[i] for i, group in enumerate(groups) for index in group}
    bars = _unstack(threshold - (missing >= equal).astype(threshold.dtype))
    cuts = _unstack(is_cut.astype(threshold.dtype))
    return tuple(
        (key(array) > bars[index])
        | (join_axes(ties_of[index], array) & (cuts[index] > 0))
        for index, array in enumerate(arrays)
    )


def _group_alike(arrays: Arrays) -> list[list[int]]:
    """The indices of arrays of one shape and, where their types tell, one sharding."""
    groups: dict[Any, list[int]] = {}
    for index, array in enumerate(arrays):
        kind = (array.shape, explicit_sharding(array))
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


def _split_axes(stack: jax.Array) -> jax.Array:
    """Cuts each axis but the first in two: (l, a, b) to (l, p, a / p, q, b / q).

    Sums over the second halves are local as long as the first ones hold the sharding.
    """
    sharding = explicit_sharding(stack)
    for axis in reversed(range(1, stack.ndim)):
        size = stack.shape[axis]
        number = _PARTS
        if axis == stack.ndim - 1:  # the innermost loop should not be too short
            number = max(8, min(number, 2 ** ((size // 32).bit_length() - 1)))
        if sharding is not None:
            number = math.lcm(number, shards(sharding, sharding.spec[axis]))
        stack = split_axis(stack, axis, max(1, size // math.gcd(size, number)))
    return stack


def _places(array: jax.Array, start: jax.Array) -> jax.Array:
    """Numbers the entries of an array row by row, from ``start`` on.

    Sums of one iota for each axis: they shard like the array. The start is added first,
    or XLA would hoist the rest out of a loop over starts and store it.
    """
    places = jnp.zeros_like(array, start.dtype) + start
    stride = 1
    for axis in reversed(range(array.ndim)):
        places += stride * jax.lax.broadcasted_iota(start.dtype, array.shape, axis)
        stride *= array.shape[axis]
    return places


class _Bound(NamedTuple):
    """A value, and how many entries lie below it."""

    value: jax.Array
    below: jax.Array


def _radix_select(
    predicate: Predicate,
    arrays: Arrays,
    limit: jax.Array,
    start: jax.Array,
    width: int,
) -> jax.Array:
    """Finds the largest value with at most ``limit`` entries below.

    Of the ``2**width`` values from ``start`` on, which itself has so few below.

    Stops early at one with exactly ``limit`` entries below.

    Args:
      predicate: which entries lie below a candidate.
      arrays: what the predicate is called with.
      limit: an integer scalar, at least 0.
      start: the smallest candidate, of the dtype of all.
      width: bits of what may be added to it.
    """
    digits = jnp.arange(1, 2**_DIGIT, dtype=start.dtype)

    def cond(state: tuple[_Bound, jax.Array]) -> jax.Array:
        bound, bits = state
        return (bits > 0) & (bound.below != limit)

    def body(state: tuple[_Bound, jax.Array]) -> tuple[_Bound, jax.Array]:
        bound, bits = state
        # The last digit may reach above the bits that are open: too many entries lie
        # below those candidates to choose them. They must not wrap around, though.
        bits = jnp.maximum(bits - _DIGIT, 0)
        room = start + jnp.iinfo(start.dtype).max - bound.value
        steps = jnp.minimum(digits << bits.astype(start.dtype), room)
        candidates = bound.value + steps
        # Tied to the step, or XLA would compute the keys before the loop and keep them.
        here, candidates = jax.lax.optimization_barrier((arrays, candidates))
        counts = _count(predicate, here, candidates, limit.dtype)
        fitting = jnp.sum(counts <= limit)
        best = _Bound(candidates[fitting - 1], counts[fitting - 1])
        return jax.tree.map(partial(jnp.where, fitting > 0), best, bound), bits

    # Under shard_map a loop has to start from values that vary as its results do.
    nothing = jnp.zeros_like(limit)
    for array in arrays:
        nothing += jnp.zeros_like(array, limit.dtype, shape=())
    first = _Bound(start + nothing.astype(start.dtype), nothing)
    bound, _ = jax.lax.while_loop(cond, body, (first, jnp.array(width)))
    return bound.value


def _count(
    predicate: Predicate,
    arrays: Arrays,
    candidates: Sequence[jax.Array] | jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """How many entries of all arrays lie below each candidate."""
    by_array = _count_true([predicate(arrays, c) for c in candidates], dtype)
    return jnp.sum(jnp.concatenate(by_array, 1), axis=1, dtype=dtype)


def _count_true(sets: Sequence[Arrays], dtype: jnp.dtype) -> list[jax.Array]:
    """Counts the true entries along all axes but the first.

    Args:
      sets: bool arrays as ``sets[which][array]``, cut by `_split_axes`.
      dtype: of the counts, an integer that can hold them.

    Returns:
      For each array of a set the counts, shape (sets, first axis).
    """
    return [
        jax.lax.platform_dependent(
            masks,
            cpu=partial(_count_in_one_loop, dtype=dtype),
            default=partial(_count_each, dtype=dtype),
        )
        for masks in zip(*sets, strict=True)
    ]


def _count_each(masks: Arrays, dtype: jnp.dtype) -> jax.Array:
    return jnp.stack(
        [jnp.sum(mask, axis=range(1, mask.ndim), dtype=dtype) for mask in masks]
    )


def _count_in_one_loop(masks: Arrays, dtype: jnp.dtype) -> jax.Array:
    """Counts in all masks at once, as XLA does by itself on GPU but not on CPU.

    There it computes each sum as a tree, many times slower than a plain loop; a
    reduction of many operands is one. It must not run over the axes that are sharded:
    XLA would gather its results.
    """
    counts = jax.lax.reduce(
        [mask.astype(dtype) for mask in masks],
        [jnp.zeros([], dtype)] * len(masks),
        lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)],
        range(2, masks[0].ndim, 2),
    )
    return jnp.sum(jnp.stack(counts), axis=range(2, counts[0].ndim + 1), dtype=dtype)


def _unstack(vector: jax.Array) -> Sequence[jax.Array]:
    """The entries of a vector as scalars.

    XLA on CPU compiles equal computations once. It would compile an index into whatever
    uses the entry, and nothing would be equal: so one reduction makes all the scalars.
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
