"""Rules of operations that move positions: reshape, broadcast, slice, stack."""

from collections.abc import Sequence

import numpy as np
from jax.extend import core as jex

from cram_jax.structure.elementwise import Rule
from cram_jax.structure.equations import shape_of
from cram_jax.structure.factors import (
    ODD_MEETING,
    align,
    concatenate,
    regroup,
    take_slice,
)
from cram_jax.structure.labels import Axis, Factor, Key, Labels, Source, Value


def broadcast_in_dim(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """New axes hold the same value everywhere: any of their positions may go."""
    value = ins[0]
    origin = {
        int(to): start for start, to in enumerate(eqn.params["broadcast_dimensions"])
    }
    axes = []
    for dimension, size in enumerate(eqn.params["shape"]):
        axis: Axis = ()
        if dimension in origin:
            axis = value.axes[origin[dimension]]
        axes.append(axis or labels.axis((*key, dimension), size, zero=value.is_zero))
    return [Value(tuple(axes), value.source, value.literal)]


def reshape(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Deals the factors to the new axes."""
    value = ins[0]
    factors = [factor for axis in value.axes for factor in axis]
    axes = regroup(labels, factors, eqn.params["new_sizes"], key)
    return [Value(tuple(axes), value.source, value.literal)]


def squeeze(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Drops axes of size 1."""
    del labels, key
    value = ins[0]
    gone = {int(d) % len(value.axes) for d in eqn.params["dimensions"]}
    axes = (axis for i, axis in enumerate(value.axes) if i not in gone)
    return [Value(tuple(axes), value.source, value.literal)]


def transpose(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Permutes the axes."""
    del labels, key
    axes = tuple(ins[0].axes[int(i)] for i in eqn.params["permutation"])
    return [Value(axes, ins[0].source)]


def rev(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Reverses the labels, in every factor."""
    del labels, key
    reversed_ = {int(d) for d in eqn.params["dimensions"]}
    axes = (
        tuple(Factor(f.ids[::-1], f.zero) for f in axis) if i in reversed_ else axis
        for i, axis in enumerate(ins[0].axes)
    )
    return [Value(tuple(axes), ins[0].source)]


def slice_(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Takes some of the labels."""
    value, params = ins[0], eqn.params
    strides = params["strides"] or (1,) * len(value.axes)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    axes = tuple(
        take_slice(labels, axis, int(start), int(stop), int(stride), (*key, i))
        for i, (axis, (start, stop, stride)) in enumerate(
            zip(value.axes, bounds, strict=True)
        )
    )
    return [Value(axes, value.source, value.literal)]


def split(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Takes consecutive slices of one axis."""
    value, along = ins[0], int(eqn.params["axis"])
    outs, start = [], 0
    for i, size in enumerate(eqn.params["sizes"]):
        stop = start + int(size)
        axes = list(value.axes)
        axes[along] = take_slice(labels, axes[along], start, stop, 1, (*key, i))
        outs.append(Value(tuple(axes), value.source))
        start = stop
    return outs


def concatenate_(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Joins the labels of one axis, and unites those of the others."""
    along = int(eqn.params["dimension"])
    out = shape_of(eqn.outvars[0])
    source = max(value.source for value in ins)
    axes: list[Axis] = []
    for dimension, size in enumerate(out):
        parts = [value.axes[dimension] for value in ins]
        place = (*key, dimension)
        if dimension == along:
            lengths = [shape_of(var)[dimension] for var in eqn.invars]
            joined = concatenate(labels, parts, lengths, place)
            if joined is None:
                joined = labels.axis((*place, "odd"), size, frozen=ODD_MEETING)
            axes.append(joined)
        else:
            axes.append(_met(labels, parts, place, source))
    return [Value(tuple(axes), source)]


def stack(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Unites the labels of all axes; the new one is frozen."""
    source = max(value.source for value in ins)
    axes = [
        _met(labels, [value.axes[i] for value in ins], (*key, i), source)
        for i in range(len(ins[0].axes))
    ]
    along = int(eqn.params["axis"])
    new = labels.axis((*key, "new"), len(ins), frozen="a stack along it")
    axes.insert(along, new)
    return [Value(tuple(axes), source)]


def unstack(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Freezes the axis, which every result drops."""
    del key
    value, along = ins[0], int(eqn.params["axis"])
    labels.freeze(value.axes[along], "unstack along it")
    axes = (axis for i, axis in enumerate(value.axes) if i != along)
    return [Value(tuple(axes), value.source)] * len(eqn.outvars)


def tile(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Repeats are free, like the new axes of a broadcast."""
    value = ins[0]
    axes = tuple(
        axis if count == 1 else (*labels.axis((*key, i), int(count)), *axis)
        for i, (axis, count) in enumerate(
            zip(value.axes, eqn.params["reps"], strict=True)
        )
    )
    return [Value(axes, value.source, value.literal)]


def _met(labels: Labels, axes: Sequence[Axis], key: Key, source: Source) -> Axis:
    """The axis of values that are combined: 0 only where all are."""
    aligned = align(labels, axes, key)
    if aligned is None:
        return tuple(Factor(factor.ids, False) for factor in axes[0])
    if source is Source.WEIGHT:
        labels.share_roles(aligned)
    return tuple(
        Factor(same[0].ids, all(factor.zero for factor in same))
        for same in zip(*aligned, strict=True)
    )


def join(labels: Labels, left: Value, right: Value, key: Key) -> Value:
    """One value that is either of two, such as what a loop carries."""
    source = max(left.source, right.source)
    axes = (
        _met(labels, pair, (*key, i), source)
        for i, pair in enumerate(zip(left.axes, right.axes, strict=True))
    )
    return Value(tuple(axes), source)


def pad(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """New positions at the ends are free, like those of a broadcast."""
    value, padding = ins
    axes: list[Axis] = []
    for i, (low, high, interior) in enumerate(eqn.params["padding_config"]):
        axis, size = value.axes[i], shape_of(eqn.outvars[0])[i]
        if (low, high, interior) == (0, 0, 0):
            axes.append(axis)
        elif low < 0 or high < 0 or interior or len(axis) != 1:
            labels.freeze(axis, "pad along it")
            axes.append(labels.axis((*key, i), size, frozen="pad along it"))
        else:
            ends = int(low), int(high)
            axes.append(_padded(labels, axis[0], ends, (*key, i)))
    # Padding along one axis is in every channel of another.
    added = any(
        low > 0 or high > 0 or interior > 0
        for low, high, interior in eqn.params["padding_config"]
    )
    if added and not padding.is_zero:
        axes = [tuple(Factor(f.ids, False) for f in axis) for axis in axes]
    return [Value(tuple(axes), value.source)]


def _padded(labels: Labels, factor: Factor, ends: tuple[int, int], key: Key) -> Axis:
    low, high = ends
    ids = [factor.ids]
    if low:
        ids.insert(0, labels.run((*key, "low"), low))
    if high:
        ids.append(labels.run((*key, "high"), high))
    return (Factor(np.concatenate(ids), factor.zero),)


def generated(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Iotas and random numbers: generated whole, then cut."""
    for value in ins:
        for axis in value.axes:
            labels.freeze(axis, "a key of random numbers")
    source = max((value.source for value in ins), default=Source.CONSTANT)
    return [
        labels.value((*key, i), shape_of(var), source)
        for i, var in enumerate(eqn.outvars)
    ]


GENERATORS = frozenset(
    [
        "iota",
        "random_bits",
        "random_seed",
        "random_unwrap",
        "random_wrap",
        "random_fold_in",
        "random_split",
        "random_gamma",
        "threefry2x32",
    ]
)

RULES: dict[str, Rule] = {
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "squeeze": squeeze,
    "transpose": transpose,
    "rev": rev,
    "slice": slice_,
    "split": split,
    "concatenate": concatenate_,
    "stack": stack,
    "unstack": unstack,
    "tile": tile,
    "pad": pad,
    **dict.fromkeys(GENERATORS, generated),
}
