"""The k largest magnitudes over a set of arrays, exactly, by counting.

Finite magnitudes are ordered like their bit patterns, so the threshold is found digit
by digit: count the entries below each candidate and keep the largest candidate that has
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

from cram_jax.reshaping import explicit_sharding, shards, split_axis

# Bits settled by one pass over the data, which counts for 2**3 - 1 candidates. Seven
# counts and the candidates just fit the registers of a CPU.
_DIGIT = 3

# Parts into which an axis is cut, so that the devices that share it count separately.
# Not more, because XLA on CPU sums longer axes as a tree.
_PARTS = 32

_INT32_ENTRIES = 2**31 - 1

Predicate: TypeAlias = Callable[[jax.Array, jax.Array, int], jax.Array]
"""Which entries of an array, the i-th of those searched, lie below a candidate."""


def keep_largest(
    arrays: Sequence[jax.Array], k: int | jax.Array, *, signed: bool = False
) -> tuple[jax.Array, ...]:
    """Marks the k entries of largest magnitude over all arrays together.

    With ``signed``, those of largest value, so that -3 is less than 1.

    Exactly ``k`` are marked, whatever the dtype. Equal magnitudes: the entry that comes
    first is marked, in the order of the arrays and then row by row. NaN counts as
    larger than infinity. Arrays of different dtypes are compared in their common one.

    Works under ``jit`` (``k`` may be traced), ``vmap`` and control flow, and on arrays
    that are sharded with automatic or explicit axes. At most 11 passes over float32, 5
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


def keep_largest_of_layers(
    array: jax.Array, k: int | jax.Array, stack: tuple[int, ...]
) -> jax.Array:
    """Marks the k entries of largest magnitude in each of the layers in an array.

    Args:
      array: of a floating dtype.
      k: how many to mark in each layer, see `keep_largest`.
      stack: the axes along which layers are stacked; if there are none, the array is
        one layer.

    Returns:
      A bool array of the same shape.
    """

    def largest(layer: jax.Array) -> jax.Array:
        return keep_largest([layer], k)[0]

    for axis in stack:  # the last becomes the outermost, so that the others stay
        largest = jax.vmap(largest, in_axes=axis, out_axes=axis)
    return largest(array)


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
    stacks = [
        _cut(_stack([arrays[i] for i in group], signed=signed)) for group in groups
    ]
    in_order = np.argsort(np.concatenate(groups))
    sizes = np.array([array.size for array in arrays], integer)

    width = 8 * dtype.itemsize
    bits = f"int{width}"

    def as_key(candidate: jax.Array) -> jax.Array:
        """Candidates start at 0, and the keys of values at the smallest integer."""
        if not signed:
            return candidate
        smallest = jnp.iinfo(bits).min
        return jax.lax.bitcast_convert_type(candidate, bits) ^ smallest

    def is_smaller(stack: jax.Array, candidate: jax.Array, group: int) -> jax.Array:
        del group
        return key(stack) < as_key(candidate)

    if signed:
        zero = jnp.zeros([], f"u{bits}")
    else:
        zero, width = jnp.zeros([], bits), width - 1
    found = _radix_select(is_smaller, stacks, total - k, zero, width, _DIGIT)
    threshold = as_key(found.value)
    if signed:  # no key is less, and the bars below may not wrap around
        threshold = jnp.maximum(threshold, -jnp.iinfo(bits).max)

    # Of the entries that equal the threshold the first ones are kept, as many as are
    # missing: all of some arrays, the first ones of one at most, none of the others.
    # Had the search stopped early, all from the threshold on would count as equal, and
    # none would be missing.
    larger = sizes - found.not_above[in_order]
    equal = found.not_above[in_order] - found.below[in_order]
    before = jnp.cumsum(equal, dtype=integer) - equal
    missing = k - jnp.sum(larger, dtype=integer) - before
    is_cut = (missing > 0) & (missing < equal)

    def end_of_ties() -> jax.Array:
        """The position, in the cut array, before which ties are kept."""
        cut = jnp.argmax(is_cut[np.concatenate(groups)])
        group_of = np.concatenate([np.full(len(g), i) for i, g in enumerate(groups)])
        index_of = np.concatenate([np.arange(len(group)) for group in groups])
        cut_group, index = jnp.asarray(group_of)[cut], jnp.asarray(index_of)[cut]

        def is_earlier_tie(layer: jax.Array, place: jax.Array, group: int) -> jax.Array:
            tied = (key(layer) == threshold) & (cut_group == group)
            return tied & (_places(layer, -place) < 0)

        layers = [
            _Cut(
                array
                if len(array) == 1
                else jax.lax.dynamic_index_in_dim(array, index),
                inner,
            )
            for array, inner in stacks
        ]
        number = jnp.sum(jnp.where(is_cut, missing, 0), dtype=integer)
        length = max(array.size for array in arrays).bit_length()
        zero = jnp.zeros([], integer)
        # Ties are rare and of one array: a smaller program matters more than passes.
        return _radix_select(is_earlier_tie, layers, number, zero, length, 1).value

    end = jax.lax.cond(
        jnp.any(is_cut), end_of_ties, lambda: jnp.zeros_like(missing, shape=())
    )
    bars = _unstack(threshold - (missing >= equal).astype(threshold.dtype))
    ends = _unstack(jnp.where(is_cut, end, 0))
    return tuple(
        (key(array) > bar) | ((key(array) == threshold) & (_places(array, -end) < 0))
        for array, bar, end in zip(arrays, bars, ends, strict=True)
    )


def _group_alike(arrays: Sequence[jax.Array]) -> list[list[int]]:
    """The indices of arrays of one shape and, if their types show it, one sharding."""
    groups: dict[Any, list[int]] = {}
    for index, array in enumerate(arrays):
        kind = (array.shape, explicit_sharding(array))
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


def _stack(arrays: Sequence[jax.Array], *, signed: bool) -> jax.Array:
    stack = jnp.stack(arrays)  # of one array no copy
    # XLA on CPU takes longer to compile a plain copy, and signs make no difference.
    return stack if signed or len(arrays) == 1 else jnp.abs(stack)


class _Cut(NamedTuple):
    """Arrays stacked along a new first axis, whose other axes are cut in two.

    Attributes:
      array: (l, a, b) as (l, p, a / p, q, b / q), without the axes of size 1.
      inner: the axes of ``a / p`` and ``b / q``. Sums over them are local as long as
        the others hold the sharding.
    """

    array: jax.Array
    inner: tuple[int, ...]


def _cut(stack: jax.Array) -> _Cut:
    """Cuts each axis but the first."""
    sharding = explicit_sharding(stack)
    ranks: list[bool] = []  # of each axis after the first, whether it is an inner one
    for axis in reversed(range(1, stack.ndim)):
        size = stack.shape[axis]
        number = _PARTS
        if axis == stack.ndim - 1:  # the innermost loop should not be too short
            number = max(8, min(number, 2 ** ((size // 32).bit_length() - 1)))
        if sharding is not None:
            number = math.lcm(number, shards(sharding, sharding.spec[axis]))
        parts = math.gcd(size, number)
        if 1 < parts < size:
            stack = split_axis(stack, axis, size // parts)
            ranks = [False, True, *ranks]
        else:
            ranks = [parts == 1, *ranks]
    inner = tuple(axis for axis, is_inner in enumerate(ranks, 1) if is_inner)
    return _Cut(stack, inner)


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


class _Found(NamedTuple):
    """A value, and how many entries of each array lie below it and up to it."""

    value: jax.Array
    below: jax.Array
    not_above: jax.Array


def _radix_select(
    predicate: Predicate,
    stacks: Sequence[_Cut],
    limit: jax.Array,
    zero: jax.Array,
    width: int,
    digit: int,
) -> _Found:
    """Finds the largest value below ``2**width`` with at most ``limit`` entries below.

    Stops early at one with exactly ``limit`` entries below; ``not_above`` then counts
    up to a later value.

    Args:
      predicate: which entries of a stack lie below a candidate; below ``zero`` none do.
      stacks: what is searched.
      limit: an integer scalar, at least 0.
      zero: of the dtype of the candidates.
      width: bits of the value.
      digit: bits settled by one pass, which counts for ``2**digit - 1`` candidates.
    """
    arrays, inner = zip(*stacks, strict=True)
    steps = jnp.arange(1, 2**digit, dtype=zero.dtype)
    sizes = np.concatenate(
        [np.full(len(array), array.size // max(len(array), 1)) for array in arrays]
    )

    def cond(state: tuple[_Found, jax.Array]) -> jax.Array:
        found, bits = state
        return (bits > 0) & (jnp.sum(found.below, dtype=limit.dtype) != limit)

    def body(state: tuple[_Found, jax.Array]) -> tuple[_Found, jax.Array]:
        found, bits = state
        # The last digit may reach above the bits that are open: too many entries lie
        # below those candidates to choose them. They must not wrap around, though.
        bits = jnp.maximum(bits - digit, 0)
        room = jnp.array(jnp.iinfo(zero.dtype).max, zero.dtype) - found.value
        candidates = found.value + jnp.minimum(steps << bits.astype(zero.dtype), room)
        # Tied to the step, or XLA would compute the keys before the loop and keep them.
        here, candidates = jax.lax.optimization_barrier((arrays, candidates))
        by_array = [
            _count_true(
                [predicate(array, candidate, i) for candidate in candidates],
                inner[i],
                limit.dtype,
            )
            for i, array in enumerate(here)
        ]
        counts = jnp.concatenate(by_array, axis=1)
        fitting = jnp.sum(jnp.sum(counts, axis=1, dtype=limit.dtype) <= limit)
        # The result lies between the last candidate that fits and the next one.
        values = jnp.concatenate([found.value[None], candidates])
        bounds = jnp.concatenate([found.below[None], counts, found.not_above[None]])
        return _Found(values[fitting], bounds[fitting], bounds[fitting + 1]), bits

    # Under shard_map a loop has to start from values that vary as its results do.
    nothing = jnp.zeros_like(limit)
    for array in arrays:
        nothing += jnp.zeros_like(array, limit.dtype, shape=())
    start = _Found(
        zero + nothing.astype(zero.dtype),
        jnp.full(sizes.shape, nothing),
        jnp.asarray(sizes, limit.dtype) + nothing,
    )
    found, _ = jax.lax.while_loop(cond, body, (start, jnp.array(width)))
    return found


def _count_true(
    masks: Sequence[jax.Array], inner: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
    """Counts the true entries along all axes but the first.

    Args:
      masks: bool arrays of one shape, cut by `_cut`.
      inner: their inner axes.
      dtype: of the counts, an integer that can hold them.

    Returns:
      The counts, shape (masks, first axis).
    """
    return jax.lax.platform_dependent(
        masks,
        cpu=partial(_count_in_one_loop, inner=inner, dtype=dtype),
        default=partial(_count_each, dtype=dtype),
    )


def _count_each(masks: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    return jnp.stack(
        [jnp.sum(mask, axis=range(1, mask.ndim), dtype=dtype) for mask in masks]
    )


def _count_in_one_loop(
    masks: Sequence[jax.Array], inner: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
    """Counts in all masks at once, as XLA does on its own on GPU but not on CPU.

    There it computes each sum as a tree, many times slower than a plain loop; a
    reduction of many operands is one. It must not run over the axes that are sharded:
    XLA would gather its results.
    """
    counts = jax.lax.reduce(
        [mask.astype(dtype) for mask in masks],
        [jnp.zeros([], dtype)] * len(masks),
        lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)],
        inner,
    )
    return jnp.sum(jnp.stack(counts), axis=range(2, counts[0].ndim + 1), dtype=dtype)


def _unstack(vector: jax.Array) -> Sequence[jax.Array]:
    """The entries of a vector as scalars.

    XLA on CPU compiles equal computations once. It would fuse an index into whatever
    uses the entry, and no two would be equal: so one reduction makes all the scalars.
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
