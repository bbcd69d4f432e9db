"""Rules of dot products, convolutions and windows."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from cram_jax.structure.elementwise import Rule
from cram_jax.structure.equations import shape_of
from cram_jax.structure.factors import align, regroup
from cram_jax.structure.labels import (
    Axis,
    Factor,
    Key,
    Labels,
    Role,
    Source,
    Value,
    axis_size,
)

NOT_ZERO = "a contraction over it of two values that masks do not make 0"
WINDOW = "a window moves along it"
GROUP_PART = "a part of a group of a grouped convolution"
GROUP_INPUTS = "the inputs of one group of a grouped convolution"


def contract(
    labels: Labels, left: tuple[Value, int], right: tuple[Value, int], key: Key
) -> None:
    """Unites two axes that a sum of products runs over."""
    sides = [(value, value.axes[dimension]) for value, dimension in (left, right)]
    aligned = align(labels, [axis for _, axis in sides], key)
    if aligned is None:
        return
    for first, second in zip(*aligned, strict=True):
        if not (first.zero or second.zero):
            labels.freezes.append((first.ids, NOT_ZERO))
    (a, a_axis), (b, b_axis) = sides
    if a.source is Source.ACTIVATION and b.source is Source.ACTIVATION:
        labels.add_role(a_axis, Role.CONTRACTED)
        labels.add_role(b_axis, Role.CONTRACTED)
    elif _is_merge(left, right):
        # Factors, as of a low-rank update: the first one feeds the second.
        labels.add_role(a_axis, Role.OUTPUT)
        labels.add_role(b_axis, Role.INPUT)
    for (value, axis), (other, _) in ((sides[0], sides[1]), (sides[1], sides[0])):
        if value.source is Source.WEIGHT and other.source is Source.ACTIVATION:
            labels.add_role(axis, Role.INPUT)
            if not axis:
                for rest in value.axes:
                    labels.add_role(rest, Role.KERNEL)


def _is_merge(*sides: tuple[Value, int]) -> bool:
    """Whether two weights make a larger one, and not a norm or a projection."""
    return all(
        value.source is Source.WEIGHT
        and any(axis for i, axis in enumerate(value.axes) if i != dimension)
        for value, dimension in sides
    )


def dot_general(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Contracted axes are united and dropped; batch axes are united; free ones pass."""
    contracted, batch = eqn.params["dimension_numbers"]
    left, right = ins
    source = max(left.source, right.source)
    for i, j in zip(*contracted, strict=True):
        contract(labels, (left, int(i)), (right, int(j)), (*key, "sum", int(i)))
    axes = [
        _batch_axis(labels, ins, (int(i), int(j)), (*key, "batch", int(i)))
        for i, j in zip(*batch, strict=True)
    ]
    for value, summed, shared in zip(ins, contracted, batch, strict=True):
        used = {int(i) for i in (*summed, *shared)}
        for dimension, axis in enumerate(value.axes):
            if dimension not in used:
                axes.append(axis)
                if value.source is Source.WEIGHT and source is Source.ACTIVATION:
                    labels.add_role(axis, Role.OUTPUT)
    return [Value(tuple(axes), source)]


def _batch_axis(
    labels: Labels, ins: Sequence[Value], dimensions: tuple[int, int], key: Key
) -> Axis:
    axes = [value.axes[d] for value, d in zip(ins, dimensions, strict=True)]
    is_activation = any(value.source is Source.ACTIVATION for value in ins)
    for value, axis in zip(ins, axes, strict=True):
        if value.source is Source.WEIGHT and is_activation:
            labels.add_role(axis, Role.BATCH)
    aligned = align(labels, axes, key)
    if aligned is None:
        return tuple(Factor(factor.ids, False) for factor in axes[0])
    return tuple(
        Factor(first.ids, first.zero or second.zero)
        for first, second in zip(*aligned, strict=True)
    )


def convolution(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Features form a dot product; windows stay; groups stay or go as a whole."""
    spec = eqn.params["dimension_numbers"]
    image, kernel = ins
    batch, features, *spatial = spec.lhs_spec
    outputs, inputs, *window = spec.rhs_spec
    out_batch, out_features, *out_spatial = spec.out_spec
    axes: dict[int, Axis] = {
        out_batch: image.axes[batch],
        out_features: kernel.axes[outputs],
    }
    for of_image, of_kernel, of_out in zip(spatial, window, out_spatial, strict=True):
        labels.freeze(image.axes[of_image], WINDOW)
        labels.freeze(kernel.axes[of_kernel], WINDOW)
        size = shape_of(eqn.outvars[0])[of_out]
        axes[of_out] = labels.axis((*key, of_out), size, frozen=WINDOW)
    source = max(image.source, kernel.source)
    if eqn.params["batch_group_count"] != 1:
        for axis in (*image.axes, *kernel.axes):
            labels.freeze(axis, "a convolution with batch_group_count")
    elif eqn.params["feature_group_count"] == 1:
        contract(labels, (image, features), (kernel, inputs), (*key, "sum"))
    else:
        groups = eqn.params["feature_group_count"]
        axes[out_features] = _tie_groups(
            labels, (image.axes[features], kernel.axes[outputs]), groups, (*key, "tie")
        )
        labels.freeze(kernel.axes[inputs], GROUP_INPUTS)
    _add_kernel_roles(labels, ins, (outputs, inputs, tuple(window)))
    return [Value(tuple(axes[d] for d in range(len(axes))), source)]


def _add_kernel_roles(
    labels: Labels,
    ins: Sequence[Value],
    dimensions: tuple[int, int, tuple[int, ...]],
) -> None:
    image, kernel = ins
    outputs, inputs, window = dimensions
    if image.source is Source.ACTIVATION and kernel.source is Source.WEIGHT:
        labels.add_role(kernel.axes[outputs], Role.OUTPUT)
        labels.add_role(kernel.axes[inputs], Role.INPUT)
        for dimension in window:
            labels.add_role(kernel.axes[dimension], Role.WINDOW)


def _tie_groups(
    labels: Labels, sides: tuple[Axis, Axis], groups: int, key: Key
) -> Axis:
    """Unites all inputs and outputs of each group, and returns the outputs."""
    features, outputs = sides
    if len(features) == 1 == len(outputs):
        into = features[0].ids.reshape(groups, -1)
        out = outputs[0].ids.reshape(groups, -1)
        for grid in (into, out):
            for column in grid.T:
                labels.unite(into[:, 0], column)
        return outputs
    # Of axes in parts, as a group norm splits them, whole groups may go.
    outer, inner = zip(
        *(
            regroup(labels, axis, (groups, axis_size(axis) // groups), (*key, i))
            for i, axis in enumerate(sides)
        ),
        strict=True,
    )
    for rest in inner:
        labels.freeze(rest, GROUP_PART)
    aligned = align(labels, outer, key)
    return (*(outer if aligned is None else aligned)[1], *inner[1])


def reduce_window(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Freezes the axes that windows move along, as in pooling."""
    params = eqn.params
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    keeps_zero = eqn.primitive.name == "reduce_window_sum" or _windows_meet(params)
    axes: list[Axis] = []
    for i, axis in enumerate(ins[0].axes):
        size = after[i]
        trivial = params["window_dimensions"][i] == 1 == params["window_strides"][i]
        if trivial and size == before[i] and not any(params["padding"][i]):
            axes.append(tuple(Factor(f.ids, f.zero and keeps_zero) for f in axis))
        else:
            labels.freeze(axis, WINDOW)
            axes.append(labels.axis((*key, i), size, frozen=WINDOW))
    return [Value(tuple(axes), ins[0].source)]


def _windows_meet(params: dict[str, Any]) -> bool:
    """Whether every window has an entry, instead of padding or gaps only."""
    return all(
        base == 1 and max(low, high) < (size if dilation == 1 else 1)
        for base, dilation, size, (low, high) in zip(
            params["base_dilation"],
            params["window_dilation"],
            params["window_dimensions"],
            params["padding"],
            strict=True,
        )
    )


RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
    "reduce_window_sum": reduce_window,
    "reduce_window_max": reduce_window,
    "reduce_window_min": reduce_window,
}
