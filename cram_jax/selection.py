"""The k largest magnitudes over a set of arrays, exactly, by counting.

Finite magnitudes are ordered like their bit patterns, so the threshold is found digit
by digit: count the entries below each candidate and keep the largest candidate that has
few enough below it. Nothing is sorted or gathered; arrays may be sharded along any
axes, and the devices exchange counts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.counting import count_true, places, unstack
from cram_jax.projector import widened
from cram_jax.reshaping import gathered, placed

# Bits settled by one pass over the data, which counts for 2**3 - 1 candidates. Seven
# counts and the candidates just fit the registers of a CPU.
_DIGIT = 3

# Of the search for ties, which are rare: a smaller program matters more than passes.
_DIGIT_OF_TIES = 2

_INT32_ENTRIES = 2**31 - 1

Count: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""``(array, candidates) -> counts``: how many entries lie below each candidate."""


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
    over bfloat16. Arrays of equal shape share their compiled loops.

    Args:
      arrays: floating-point arrays of any shapes.
      k: how many to mark, an integer scalar; below 0 counts as 0, above the number of
        entries as all of them.
      signed: whether to compare values instead of magnitudes.

    Returns:
      One bool array for each array, of its shape.

    Raises:
      TypeError: an array is not of a floating dtype, or k is not an integer.
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
        if not has_magnitudes(jnp.result_type(array)):
            raise TypeError(
                f"arrays[{index}] has dtype {jnp.result_type(array).name}, expected "
                f"{MAGNITUDES}"
            )
    if jnp.ndim(k) or not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(f"k must be an integer scalar, got {k!r}")
    total = sum(jnp.size(array) for array in arrays)
    if total > _INT32_ENTRIES and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"arrays hold {total} entries, expected at most {_INT32_ENTRIES} unless "
            f"64-bit integers are enabled: jax.config.update('jax_enable_x64', True)"
        )
    if not isinstance(k, jax.Array):
        k = min(max(int(k), 0), total)  # it may not fit a default integer
    arrays, k = tuple(map(jnp.asarray, arrays)), jnp.asarray(k)
    return _keep_largest(arrays, k, signed=bool(signed))


def keep_largest_of_layers(
    array: jax.Array, k: int | jax.Array, stack: tuple[int, ...]
) -> jax.Array:
    """Marks the k entries of largest magnitude in each of the layers in an array.

    Args:
      array: of a floating dtype.
      k: how many to mark in each layer, see `keep_largest`.
      stack: the axes along which layers are stacked; if there are none, the array is
        one layer. Otherwise an array on explicit mesh axes is gathered meanwhile: jax
        cannot yet map loops over layers that are sharded in this way.

    Returns:
      A bool array of the same shape.
    """

    def largest(layer: jax.Array) -> jax.Array:
        return keep_largest([layer], k)[0]

    if not stack:
        return largest(array)
    for axis in stack:  # the last becomes the outermost, so that the others stay
        largest = jax.vmap(largest, in_axes=axis, out_axes=axis)
    return placed(largest(gathered(array)), array)


MAGNITUDES = "a floating dtype of 8 bits or more with a sign, such as bfloat16"


def has_magnitudes(dtype: Any) -> bool:
    """Whether the bits of a floating dtype, but for the sign, order its magnitudes."""
    limits = jnp.finfo(dtype)
    return bool(limits.bits == 8 * jnp.dtype(dtype).itemsize and limits.min < 0)


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
    # By bits: compared as floats, a CPU takes the smallest numbers for zeros.
    magnitude = magnitude_key(array)
    infinity = magnitude_key(jnp.full([], jnp.inf, array.dtype))
    value = jnp.where(jnp.signbit(array), -magnitude, magnitude)
    return jnp.where(magnitude > infinity, infinity + 1, value)


@partial(jax.jit, static_argnames="signed")
def _keep_largest(
    arrays: tuple[jax.Array, ...], k: jax.Array, *, signed: bool
) -> tuple[jax.Array, ...]:
    if not arrays:
        return ()
    total = sum(array.size for array in arrays)
    integer = jnp.int64 if total > _INT32_ENTRIES else jnp.int32
    # A narrow integer may not hold the total, nor an int32 a wide k.
    with jax.numpy_dtype_promotion("standard"):
        k = k.astype(jnp.promote_types(k.dtype, integer))
    k = jnp.clip(k, 0, total).astype(integer)
    dtype = _common_dtype(arrays)
    arrays = tuple(array.astype(dtype) for array in arrays)

    width = 8 * dtype.itemsize
    if signed:
        zero = jnp.zeros([], f"uint{width}")
    else:
        zero, width = jnp.zeros([], f"int{width}"), width - 1
    found = _radix_select(
        partial(_count_smaller, signed=signed, dtype=integer),
        arrays,
        np.ones(len(arrays), bool),
        limit=total - k,
        zero=zero,
        width=width,
        digit=_DIGIT,
    )
    threshold = _as_key(found.value, signed=signed)
    everywhere = jnp.iinfo(integer).max

    def ends_of_ties() -> jax.Array:
        """Before which place of each array the entries at the threshold are kept.

        They are kept from the front, as many as are missing: all of the first arrays,
        some of one, which is searched, and none of the others.
        """
        equal = found.not_above - found.below
        up_to_here = np.tri(len(arrays), dtype=bool)
        equal = jnp.sum(jnp.where(up_to_here, equal, 0), axis=1, dtype=integer)
        missing = k - (total - found.all_below - equal[-1])
        is_kept = equal <= missing
        searched = jnp.sum(is_kept)
        missing -= jnp.max(equal, initial=0, where=is_kept)
        place = _place_of_tie(arrays, searched, threshold, missing, signed=signed)
        is_searched = jnp.arange(len(arrays)) == searched
        return jnp.where(is_kept, everywhere, jnp.where(is_searched, place, 0))

    # A search that ended early found exactly k.
    ends = jax.lax.cond(
        found.all_below == total - k,
        lambda: jnp.full_like(found.below, everywhere),
        ends_of_ties,
    )
    return tuple(
        _is_kept(array, threshold, end, signed=signed)
        for array, end in zip(arrays, unstack(ends), strict=True)
    )


def _common_dtype(arrays: Sequence[jax.Array]) -> jnp.dtype:
    """One that holds every entry."""
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) == 1:
        return dtypes.pop()
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(widened(array).dtype for array in arrays))


def _place_of_tie(
    arrays: Sequence[jax.Array],
    searched: jax.Array,
    threshold: jax.Array,
    number: jax.Array,
    *,
    signed: bool,
) -> jax.Array:
    """The place in ``arrays[searched]`` that this number of ties come before.

    Of each type of arrays one is read: the one to search, or another.
    """
    groups: dict[Any, list[int]] = {}
    for index, array in enumerate(arrays):
        groups.setdefault(jax.typeof(array), []).append(index)
    group_of, place_of = np.zeros((2, len(arrays)), int)
    for index, group in enumerate(groups.values()):
        group_of[group] = index
        place_of[group] = range(len(group))
    place = jnp.asarray(place_of)[searched]
    return _radix_select(
        partial(_count_ties, threshold=threshold, signed=signed),
        [
            jax.lax.switch(place, [lambda i=i: arrays[i] for i in group])
            for group in groups.values()
        ],
        np.arange(len(groups)) == jnp.asarray(group_of)[searched],
        limit=number,
        zero=jnp.zeros_like(number, shape=()),
        width=max(array.size for array in arrays).bit_length(),
        digit=_DIGIT_OF_TIES,
    ).value


# What is done to one array is traced and lowered once for all of a shape.


@partial(jax.jit, static_argnames=("signed", "dtype"))
def _count_smaller(
    array: jax.Array, candidates: jax.Array, *, signed: bool, dtype: jnp.dtype
) -> jax.Array:
    key = _key(array, signed=signed)
    masks = [key < bar for bar in _as_key(candidates, signed=signed)]
    return count_true(masks, dtype)


@partial(jax.jit, static_argnames="signed")
def _count_ties(
    array: jax.Array, ends: jax.Array, *, threshold: jax.Array, signed: bool
) -> jax.Array:
    """Counts the entries before each end that equal the threshold."""
    is_tie = _key(array, signed=signed) == threshold
    masks = [is_tie & (places(array, -end) < 0) for end in ends]
    return count_true(masks, ends.dtype)


@partial(jax.jit, static_argnames="signed")
def _is_kept(
    array: jax.Array, threshold: jax.Array, end: jax.Array, *, signed: bool
) -> jax.Array:
    # XLA on CPU compiles equal computations once. A threshold that they share would be
    # the first operand of some and the second of others.
    threshold, end = jax.lax.optimization_barrier((threshold, end))
    key = _key(array, signed=signed)
    return (key > threshold) | ((key == threshold) & (places(array, -end) < 0))


def _key(array: jax.Array, *, signed: bool) -> jax.Array:
    return value_key(array) if signed else magnitude_key(array)


def _as_key(candidates: jax.Array, *, signed: bool) -> jax.Array:
    """Candidates start at 0, and the keys of values at the smallest integer."""
    if not signed:
        return candidates
    bits = jnp.dtype(f"int{8 * candidates.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(candidates, bits) ^ jnp.iinfo(bits).min


class _Found(NamedTuple):
    """A value, and how many entries lie below it and up to it.

    Attributes:
      value: a scalar.
      all_below: of all arrays together.
      below: of each array.
      not_above: of each array.
    """

    value: jax.Array
    all_below: jax.Array
    below: jax.Array
    not_above: jax.Array


def _radix_select(
    count: Count,
    arrays: Sequence[jax.Array],
    is_searched: jax.Array | np.ndarray,
    *,
    limit: jax.Array,
    zero: jax.Array,
    width: int,
    digit: int,
) -> _Found:
    """Finds the largest value below ``2**width`` with at most ``limit`` entries below.

    Stops early at one with exactly ``limit`` entries below; ``not_above`` then counts
    up to a later value.

    Args:
      count: how many entries of an array lie below each of some candidates; below
        ``zero`` none do.
      arrays: what may be searched.
      is_searched: bool, shape (arrays,).
      limit: an integer scalar, at least 0.
      zero: of the dtype of the candidates.
      width: bits of the value.
      digit: bits settled by one pass, which counts for ``2**digit - 1`` candidates.
    """
    arrays = tuple(arrays)
    steps = jnp.arange(1, 2**digit, dtype=zero.dtype)
    sizes = np.array([array.size for array in arrays], limit.dtype)

    def cond(state: tuple[_Found, jax.Array]) -> jax.Array:
        found, bits = state
        return (bits > 0) & (found.all_below != limit)

    def body(state: tuple[_Found, jax.Array]) -> tuple[_Found, jax.Array]:
        found, bits = state
        # The last digit may reach above the bits that are open: too many entries lie
        # below those candidates to choose them. One that wraps around is less than the
        # value found so far, and changes nothing.
        bits = jnp.maximum(bits - digit, 0)
        candidates = found.value + (steps << bits.astype(zero.dtype))
        # Tied to the step, or XLA would compute the keys before the loop and keep them.
        here, candidates = jax.lax.optimization_barrier((arrays, candidates))
        # Apart from the totals, or XLA would count again for each of them.
        counts = jax.lax.optimization_barrier(
            jnp.stack([count(array, candidates) for array in here])
        )
        counts = jnp.where(is_searched[:, None], counts, 0)
        totals = jnp.sum(counts, axis=0, dtype=limit.dtype)
        fits = totals <= limit
        # The result lies between the last candidate that fits and the next one.
        value = jnp.max(candidates, initial=found.value, where=fits)
        below = jnp.max(jnp.where(fits, counts, 0), axis=1)
        not_above = jnp.min(jnp.where(fits, sizes[:, None], counts), axis=1)
        return _Found(
            value,
            jnp.max(totals, initial=found.all_below, where=fits),
            jnp.maximum(found.below, below),
            jnp.minimum(found.not_above, not_above),
        ), bits

    # Under shard_map a loop has to start from values that vary as its results do.
    nothing = jnp.zeros_like(limit)
    for array in arrays:
        nothing += jnp.zeros_like(array, limit.dtype, shape=())
    start = _Found(
        zero + nothing.astype(zero.dtype),
        nothing,
        jnp.full(sizes.shape, nothing),
        jnp.asarray(sizes) + nothing,
    )
    found, _ = jax.lax.while_loop(cond, body, (start, jnp.array(width)))
    return found
