"""The k largest magnitudes over a set of arrays, exactly, by counting.

Finite magnitudes order like their bit patterns, so the k-th largest is found digit by
digit: count how many entries reach each candidate, keep the largest candidate that k
entries reach, refine it. Nothing is sorted or gathered; arrays may be sharded along any
axes, and the devices exchange counts.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from cram_jax.counting import count_true, inside_shard_map, is_alone

# Bits settled by one pass over the data, which counts for 2**3 - 1 candidates. Seven
# and their counts just fit the registers of a CPU: eight take half as long again.
_DIGIT = 3

_INT32_ENTRIES = 2**31 - 1

_SMALL = 2**18  # entries: a megabyte of float32

Arrays: TypeAlias = Sequence[jax.Array]
Reaches: TypeAlias = Callable[[Arrays, jax.Array], list[jax.Array]]
"""From arrays and a candidate to bool arrays: which entries reach it."""


def keep_largest(
    arrays: Sequence[jax.Array], k: int | jax.Array
) -> tuple[jax.Array, ...]:
    """Marks the k entries of largest magnitude over all arrays together.

    Exactly ``k`` are marked, whatever the dtype. Equal magnitudes: the entry that comes
    first is marked, in the order of the arrays and then row by row. NaN counts as
    larger than infinity. Arrays of different dtypes are compared in their common one.

    Works under ``jit`` (``k`` may be traced), ``vmap`` and control flow, and on arrays
    that are sharded with automatic or explicit axes. At most 11 passes over float32, 5
    over bfloat16; a few more where equal magnitudes straddle the k-th.

    Args:
      arrays: floating-point arrays of any shapes.
      k: how many to mark, an integer scalar; below 0 counts as 0, above the number of
        entries as all of them.

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
    return _keep_largest(tuple(map(jnp.asarray, arrays)), k)


@jax.jit
def _keep_largest(
    arrays: tuple[jax.Array, ...], k: int | jax.Array
) -> tuple[jax.Array, ...]:
    if not arrays:
        return ()
    if not _lie_together(arrays):
        return _select(arrays, k, together=False)
    groups = _group_small(arrays)
    masks = _select([_join(group) for group in groups], k, together=True)
    return tuple(itertools.chain(*map(_split, masks, groups)))


def _select(
    arrays: Arrays, k: int | jax.Array, *, together: bool
) -> tuple[jax.Array, ...]:
    total = sum(array.size for array in arrays)
    integer = jnp.int64 if total > _INT32_ENTRIES else jnp.int32
    k = jnp.clip(k, 0, total).astype(integer)
    dtype = jnp.result_type(*arrays)
    key_dtype = jnp.dtype(f"int{8 * dtype.itemsize}")

    def by_magnitude(arrays: Arrays, candidate: jax.Array) -> list[jax.Array]:
        return [magnitude_key(x.astype(dtype)) >= candidate for x in arrays]

    # Where more than k reach the k-th largest magnitude, the last ones of those that
    # equal it have to go: the same search, with the place as the lower digits.
    def by_place(arrays: Arrays, candidate: jax.Array) -> list[jax.Array]:
        keys = [magnitude_key(x.astype(dtype)) for x in arrays]
        margins = _places_from_the_end(arrays, -candidate)
        return [
            (key > threshold) | ((key == threshold) & (margin >= 0))
            for key, margin in zip(keys, margins, strict=True)
        ]

    zero = _Found(jnp.zeros([], key_dtype), jnp.array(total, integer))
    threshold, count = _largest_reached(
        by_magnitude, arrays, k, zero, width=8 * dtype.itemsize - 1
    )
    zero = _Found(jnp.zeros([], integer), count)
    place, _ = _largest_reached(by_place, arrays, k, zero, width=total.bit_length())
    if together:
        return _apart(lambda: tuple(by_place(arrays, place)), place < 0)
    return tuple(by_place(arrays, place))


def _lie_together(arrays: Arrays) -> bool:
    """Whether they are whole and on one device, so that they may be concatenated."""
    kinds = {kind for a in arrays for kind in jax.typeof(a).sharding.mesh.axis_types}
    return is_alone() and not kinds & {AxisType.Explicit, AxisType.Manual}


def _group_small(arrays: Arrays) -> list[list[jax.Array]]:
    """Each run of small arrays in a group, and every other array in its own.

    A group is copied into one array, which costs next to nothing: a loop body less for
    each array, which XLA compiles several times faster.
    """
    groups: list[list[jax.Array]] = []
    for small, run in itertools.groupby(arrays, lambda array: array.size <= _SMALL):
        members = list(run)
        groups += [members] if small else [[array] for array in members]
    return groups


def _join(group: Arrays) -> jax.Array:
    """One flat array: along a single axis a place costs the least to compute."""
    dtype = jnp.result_type(*group)
    return jnp.concatenate([array.astype(dtype).ravel() for array in group])


def _split(mask: jax.Array, group: Arrays) -> list[jax.Array]:
    ends = list(itertools.accumulate(array.size for array in group))
    parts = jnp.split(mask, ends[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, group, strict=True)]


def _apart(function: Callable[[], Any], never: jax.Array) -> Any:
    """Calls a function in a loop of one round, but XLA does not know that.

    Otherwise it would compile the function into whatever reads a part of its result,
    and compute that part anew there.

    Args:
      function: returns arrays.
      never: a bool scalar, computed, and False.
    """
    shapes = jax.eval_shape(function)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    _, result = jax.lax.while_loop(
        lambda state: ~state[0],
        lambda state: (jnp.ones([], bool), function()),
        (never, nothing),
    )
    return result


def magnitude_key(array: jax.Array) -> jax.Array:
    """Integers from 0 in the order of the magnitudes of a floating-point array.

    They are signed, because CPUs compare vectors of signed integers in one instruction.
    """
    bits = jnp.dtype(f"int{8 * array.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(array, bits) & jnp.iinfo(bits).max


def _places_from_the_end(arrays: Arrays, start: jax.Array) -> list[jax.Array]:
    """``start`` for the last entry of the last array, one more for each before it.

    Sums of one iota for each axis: they shard like the arrays. The start comes first,
    so that in a loop over starts XLA does not compute the rest before it, and store it.
    """
    places = []
    after = sum(array.size for array in arrays)
    for array in arrays:
        after -= array.size
        place = jnp.zeros_like(array, start.dtype) + (start + (after + array.size - 1))
        stride = 1
        for axis in reversed(range(array.ndim)):
            along = jax.lax.broadcasted_iota(start.dtype, array.shape, axis)
            place -= along * stride
            stride *= array.shape[axis]
        places.append(place)
    return places


class _Found(NamedTuple):
    """A candidate, and how many entries reach it."""

    candidate: jax.Array
    reached_by: jax.Array


def _largest_reached(
    reaches: Reaches, arrays: Arrays, k: jax.Array, zero: _Found, width: int
) -> _Found:
    """Finds the largest candidate below ``2**width`` that at least k entries reach.

    Stops early at one that exactly k reach.
    """
    integer = zero.candidate.dtype
    digits = jnp.arange(1, 2**_DIGIT, dtype=integer)

    def is_open(state: tuple[_Found, jax.Array]) -> jax.Array:
        found, bits = state
        return (bits > 0) & (found.reached_by != k)

    def settle(state: tuple[_Found, jax.Array]) -> tuple[_Found, jax.Array]:
        found, bits = state
        # The last digit may reach above the bits that are open: too few entries are
        # there, so those candidates change nothing. They must not wrap around, though.
        bits = jnp.maximum(bits - _DIGIT, 0)
        room = jnp.iinfo(integer).max - found.candidate
        steps = jnp.minimum(digits << bits.astype(integer), room)
        candidates = found.candidate + steps
        # Tied to the step, or XLA would compute the keys before the loop and keep them.
        here, candidates = jax.lax.optimization_barrier((arrays, candidates))
        counts = count_true([reaches(here, c) for c in candidates], k.dtype)
        enough = jnp.sum(counts >= k)
        best = _Found(candidates[enough - 1], counts[enough - 1])
        found = jax.tree.map(partial(jnp.where, enough > 0), best, found)
        return found, bits

    if inside_shard_map():
        # There a loop has to start from values that vary as its results do.
        nothing = sum(jnp.sum(x, where=False).astype(k.dtype) for x in arrays) + (k - k)
        zero = jax.tree.map(lambda x: x + nothing.astype(x.dtype), zero)
    return jax.lax.while_loop(is_open, settle, (zero, jnp.array(width)))[0]
