"""How the factors of axes follow reshapes and slices, and how two axes unite."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from cram_jax.structure.labels import (
    Axis,
    Factor,
    Ids,
    Key,
    Labels,
    axis_size,
    factor_sizes,
)

ODD_RESHAPE = "a reshape that neither merges nor splits whole axes"
EMPTY = "an array without entries"
JOINED = "a reshape stacks what was joined along it"
ODD_MEETING = "axes of different structure meet"
ODD_SLICE = "a slice across the parts of an axis"
ONE_POSITION = "a position of the axis is indexed by its number"


def regroup(
    labels: Labels, factors: Sequence[Factor], sizes: Sequence[int], key: Key
) -> list[Axis]:
    """Deals factors, outer to inner, to axes of these sizes, as a reshape does."""
    if 0 in sizes:
        return _regroup_empty(labels, factors, sizes, key)
    queue = list(factors)
    axes = []
    for dimension, size in enumerate(sizes):
        taken: list[Factor] = []
        missing = size
        while missing > 1:
            factor = queue.pop(0)
            length = len(factor.ids)
            if missing % length == 0:
                taken.append(factor)
                missing //= length
            elif length % missing == 0:
                place = (*key, dimension, missing)
                outer, inner = _split(labels, factor, missing, place)
                taken.extend(outer)
                queue[:0] = inner
                missing = 1
            else:
                labels.freeze(factors, ODD_RESHAPE)
                return [
                    labels.axis((*key, "odd", d), n, frozen=ODD_RESHAPE)
                    for d, n in enumerate(sizes)
                ]
        axes.append(tuple(taken))
    return axes


def _regroup_empty(
    labels: Labels, factors: Sequence[Factor], sizes: Sequence[int], key: Key
) -> list[Axis]:
    """Deals only the factors inside of the last empty axis: those of an example."""
    last = max(d for d, size in enumerate(sizes) if size == 0)
    missing = math.prod(sizes[last + 1 :])
    start = len(factors)
    while missing > 1 and start:
        length = len(factors[start - 1].ids)
        if length == 0 or missing % length:
            break
        start -= 1
        missing //= length
    if missing > 1:
        start, last = len(factors), len(sizes) - 1
    labels.freeze(factors[:start], EMPTY)
    outer = [
        labels.axis((*key, "empty", d), n, frozen=EMPTY)
        for d, n in enumerate(sizes[: last + 1])
    ]
    return [*outer, *regroup(labels, factors[start:], sizes[last + 1 :], key)]


def _split(
    labels: Labels, factor: Factor, outer: int, key: Key
) -> tuple[list[Factor], list[Factor]]:
    """The outer and the inner part of a factor that a reshape splits."""
    inner = len(factor.ids) // outer
    if labels.refine(factor.ids, inner):
        # The trace is read again with this split; until then, any labels will do.
        return (
            list(labels.axis((*key, "outer"), outer)),
            list(labels.axis((*key, "inner"), inner)),
        )
    reason = (
        f"a reshape splits an axis of {len(factor.ids)} into {outer} x {inner}, "
        f"against another split"
    )
    grid = factor.ids.reshape(outer, inner)
    if (grid == grid[:1]).all():  # repeated as a whole
        frozen = labels.axis((*key, "repeats"), outer, frozen=reason)
        return list(frozen), [Factor(grid[0], factor.zero)]
    if labels.is_joined(grid):  # side by side, and now a stack: they go together
        for row in grid[1:]:
            labels.unite(grid[0], row)
        stacked = labels.axis((*key, "joined"), outer, frozen=JOINED)
        return list(stacked), [Factor(grid[0], factor.zero)]
    for column in grid.T[1:]:
        labels.unite(grid[:, 0], column)
    frozen = labels.axis((*key, "rest"), inner, frozen=reason)
    return [Factor(grid[:, 0], factor.zero)], list(frozen)


def align(labels: Labels, axes: Sequence[Axis], key: Key) -> list[Axis] | None:
    """Unites axes of one size, position by position.

    Returns:
      The axes with equal factors; None, after freezing them all, if they have none.
    """
    aligned = list(axes)
    for attempt in range(4):
        if len({factor_sizes(axis) for axis in aligned}) == 1:
            for axis in aligned[1:]:
                for first, other in zip(aligned[0], axis, strict=True):
                    labels.unite(first.ids, other.ids)
            return aligned
        sizes = _common_sizes(aligned)
        if sizes is None:
            break
        aligned = [
            tuple(
                factor
                for part in regroup(labels, axis, sizes, (*key, "align", attempt, i))
                for factor in part
            )
            for i, axis in enumerate(aligned)
        ]
    for axis in (*axes, *aligned):
        labels.freeze(axis, ODD_MEETING)
    return None


def _common_sizes(axes: Sequence[Axis]) -> list[int] | None:
    """Factor sizes that refine those of every axis, if the splits nest."""
    tails = set()
    for axis in axes:
        tail = 1
        for factor in reversed(axis):
            tail *= len(factor.ids)
            tails.add(tail)
    cuts = [*sorted(tails, reverse=True), 1]
    if any(outer % inner for outer, inner in itertools.pairwise(cuts)):
        return None
    return [outer // inner for outer, inner in itertools.pairwise(cuts)]


def take_slice(
    labels: Labels, axis: Axis, start: int, stop: int, stride: int, key: Key
) -> Axis:
    """The positions ``start:stop:stride`` of an axis."""
    if (start, stop, stride) == (0, axis_size(axis), 1):
        return axis
    if not axis:
        return labels.axis(key, len(range(start, stop, stride)))
    outer, *inner = axis
    tail = axis_size(tuple(inner))
    if inner and (stride != 1 or start % tail or stop % tail):
        labels.freeze(axis, ODD_SLICE)
        length = len(range(start, stop, stride))
        return labels.axis(key, length, frozen=ODD_SLICE)
    ids = outer.ids[start // tail : stop // tail : stride]
    if len(ids) == 1:
        labels.freezes.append((ids, ONE_POSITION))
        return tuple(inner)
    return (Factor(ids, outer.zero), *inner)


def concatenate(
    labels: Labels, axes: Sequence[Axis], sizes: Sequence[int], key: Key
) -> Axis | None:
    """Axes one after the other; None, after freezing them, if their parts differ."""
    inner_sizes = max((factor_sizes(axis)[1:] for axis in axes), key=len)
    tail = math.prod(inner_sizes)
    parts = []
    for i, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        if factor_sizes(axis)[1:] != inner_sizes and size % tail == 0 and size > tail:
            wanted = [size // tail, *inner_sizes]
            grouped = regroup(labels, axis, wanted, (*key, "part", i))
            axis = tuple(factor for part in grouped for factor in part)
        parts.append(axis)
    if any(factor_sizes(axis)[1:] != inner_sizes for axis in parts):
        for axis in (*axes, *parts):
            labels.freeze(axis, ODD_MEETING)
        return None
    return _join(labels, parts, key)


def _join(labels: Labels, parts: Sequence[Axis], key: Key) -> Axis:
    ids: list[Ids] = []
    for i, axis in enumerate(parts):
        if axis:
            ids.append(axis[0].ids)
        else:
            ids.append(labels.run((*key, "single", i), 1, frozen=ONE_POSITION))
    # A single position is frozen, so it implies nothing about removed ones.
    zero = all(axis[0].zero for axis in parts if axis)
    outer = Factor(np.concatenate(ids), zero)
    inner = []
    for same in zip(*(axis[1:] for axis in parts), strict=True):
        for other in same[1:]:
            labels.unite(same[0].ids, other.ids)
        inner.append(Factor(same[0].ids, all(factor.zero for factor in same)))
    return (outer, *inner)
