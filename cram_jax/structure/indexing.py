"""Rules of gathers, and of slices whose start is computed."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from cram_jax.structure.elementwise import Rule
from cram_jax.structure.equations import dtype_of, shape_of
from cram_jax.structure.factors import align
from cram_jax.structure.labels import (
    Axis,
    Factor,
    Key,
    Labels,
    Role,
    Source,
    Value,
)

LOOKUP = "entries are looked up along it by index"
UPDATE = "a part of it is overwritten"


def gather(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Axes that are taken whole pass; the axes of a table and of its indices stay."""
    table, indices = ins
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, out_shape = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [i for i in range(len(shape)) if i not in dropped]
    may_fill = _may_fill(eqn)
    # Where nothing is filled, an axis that is taken whole has only one start: 0.
    indexed = numbers.start_index_map if _is_checked(eqn) else ()
    axes: dict[int, Axis] = {}
    for out, i in zip(numbers.offset_dims, window, strict=True):
        if sizes[i] == shape[i] and i not in indexed:
            axes[out] = tuple(
                Factor(factor.ids, factor.zero and not may_fill)
                for factor in table.axes[i]
            )
            if table.source is Source.WEIGHT:
                labels.add_role(table.axes[i], Role.OUTPUT)
        else:
            _look_up(labels, table, i)
            axes[out] = labels.axis((*key, out), out_shape[out], frozen=LOOKUP)
    for i in dropped:
        _look_up(labels, table, i)
    for axis in indices.axes:
        labels.freeze(axis, "an axis of indices")
    rest = iter(indices.axes[:-1])
    for out in range(len(out_shape)):
        if out not in axes:
            axes[out] = tuple(Factor(factor.ids, False) for factor in next(rest))
    source = max(table.source, indices.source)
    return [Value(tuple(axes[out] for out in range(len(out_shape))), source)]


def _is_checked(eqn: jex.JaxprEqn) -> bool:
    """Whether an index out of range gives another number than those of the table."""
    return eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP


def _may_fill(eqn: jex.JaxprEqn) -> bool:
    """Whether an index out of range puts another number than 0 into every channel.

    NaN does not count: with it the sum over the channels is NaN, masked or smaller.
    """
    if not _is_checked(eqn):
        return False
    fill = eqn.params["fill_value"]
    if fill is None:
        return not jnp.issubdtype(dtype_of(eqn.outvars[0]), jnp.inexact)
    return not (fill == 0 or np.isnan(fill))


def _look_up(labels: Labels, table: Value, dimension: int) -> None:
    labels.freeze(table.axes[dimension], LOOKUP)
    if table.source is Source.WEIGHT:
        labels.add_role(table.axes[dimension], Role.LOOKUP)


def dynamic_slice(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Axes that are taken whole pass."""
    value = ins[0]
    axes = []
    for i, size in enumerate(eqn.params["slice_sizes"]):
        if size == shape_of(eqn.invars[0])[i]:
            axes.append(value.axes[i])
        else:
            _look_up(labels, value, i)
            axes.append(labels.axis((*key, i), size, frozen=LOOKUP))
    return [Value(tuple(axes), max(v.source for v in ins))]


def dynamic_update_slice(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Axes that are overwritten whole are united with those of the update."""
    value, update = ins[:2]
    axes = []
    for i, (axis, new) in enumerate(zip(value.axes, update.axes, strict=True)):
        whole = shape_of(eqn.invars[0])[i] == shape_of(eqn.invars[1])[i]
        aligned = align(labels, [axis, new], (*key, i)) if whole else None
        if aligned is None:
            labels.freeze((*axis, *new), UPDATE)
            axes.append(tuple(Factor(factor.ids, False) for factor in axis))
        else:
            axes.append(
                tuple(
                    Factor(old.ids, old.zero and other.zero)
                    for old, other in zip(*aligned, strict=True)
                )
            )
    return [Value(tuple(axes), max(v.source for v in ins))]


RULES: dict[str, Rule] = {
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
}
