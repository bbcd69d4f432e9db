"""Rules of operations that treat every position alike: arithmetic, and reductions."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax.extend import core as jex

from cram_jax.structure.equations import shape_of
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

Rule: TypeAlias = Callable[[Labels, jex.JaxprEqn, Sequence[Value], Key], list[Value]]
"""From the labels of an equation's inputs to those of its outputs."""

KEEP_ZERO = frozenset(
    [
        "neg",
        "abs",
        "sign",
        "sqrt",
        "cbrt",
        "tanh",
        "sin",
        "tan",
        "asin",
        "atan",
        "sinh",
        "asinh",
        "atanh",
        "erf",
        "erf_inv",
        "expm1",
        "log1p",
        "floor",
        "ceil",
        "round",
        "convert_element_type",
        "copy",
        "copy_p",
        "real",
        "imag",
        "conj",
        "square",
        "reduce_precision",
        "stop_gradient",
        "name",
        "sharding_constraint",
    ]
)
LOSE_ZERO = frozenset(
    [
        "exp",
        "exp2",
        "log",
        "logistic",
        "cos",
        "cosh",
        "acos",
        "acosh",
        "erfc",
        "rsqrt",
        "not",
        "is_finite",
        "lgamma",
        "digamma",
        "population_count",
        "clz",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "atan2",
        "nextafter",
        "shift_left",
        "shift_right_logical",
        "shift_right_arithmetic",
        "igamma",
        "igammac",
        "eq_to",
        "lt_to",
        "le_to",
    ]
)
ALL_ZERO = frozenset(["add", "sub", "add_any", "or", "xor", "complex"])
ANY_ZERO = frozenset(["mul", "and"])
FIRST_ZERO = frozenset(["div", "rem"])
OTHERS = frozenset(["max", "min", "clamp", "select_n", "integer_pow", "pow"])
ELEMENTWISE = KEEP_ZERO | LOSE_ZERO | ALL_ZERO | ANY_ZERO | FIRST_ZERO | OTHERS
REDUCTIONS = frozenset(
    [
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "reduce_xor",
        "argmax",
        "argmin",
    ]
)


def elementwise(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Unites the axes of all inputs."""
    rank = len(shape_of(eqn.outvars[0]))
    source = max((value.source for value in ins), default=Source.CONSTANT)
    # Not what was or is broadcast, such as the scale of each channel.
    kernels = [
        i
        for i, value in enumerate(ins)
        if value.source is Source.WEIGHT
        and shape_of(eqn.invars[i]) == shape_of(eqn.outvars[0])
        and all(map(labels.is_parameter, value.axes))
    ]
    axes: list[Axis] = []
    for dimension in range(rank):
        # An axis of size 1 broadcasts.
        long = [i for i, v in enumerate(ins) if len(v.axes) == rank]
        long = [i for i in long if ins[i].axes[dimension]]
        axis = [ins[i].axes[dimension] for i in long]
        if not axis:
            axes.append(())
            continue
        if source is Source.ACTIVATION:
            for i in long:
                if ins[i].source is Source.WEIGHT:
                    labels.add_role(ins[i].axes[dimension], Role.OUTPUT)
        aligned = align(labels, axis, (*key, dimension))
        if aligned is None:
            axes.append(tuple(Factor(factor.ids, False) for factor in axis[0]))
            continue
        met = dict(zip(long, aligned, strict=True))
        if source is Source.WEIGHT:
            labels.share_roles([met[i] for i in kernels if i in met])
        axes.append(_united(eqn, ins, met, kernels))
    return [Value(tuple(axes), source, _converted(eqn, ins))]


def _converted(eqn: jex.JaxprEqn, ins: Sequence[Value]) -> Any:
    """A known number in its new dtype, as the zero that `jnp.pad` pads with."""
    if eqn.primitive.name != "convert_element_type" or ins[0].literal is None:
        return None
    return np.asarray(ins[0].literal).astype(eqn.params["new_dtype"])


def _united(
    eqn: jex.JaxprEqn,
    ins: Sequence[Value],
    axes: dict[int, Axis],
    kernels: Sequence[int],
) -> Axis:
    """The axis of the result, with the labels of a weight if there is one."""
    weights = (i for i in axes if ins[i].source is Source.WEIGHT)
    first = next((i for i in kernels if i in axes), next(weights, next(iter(axes))))
    factors = []
    for place, factor in enumerate(axes[first]):
        zeros = [
            axes[i][place].zero if i in axes else value.is_zero
            for i, value in enumerate(ins)
        ]
        factors.append(Factor(factor.ids, _zero_after(eqn, ins, zeros)))
    return tuple(factors)


def _zero_after(eqn: jex.JaxprEqn, ins: Sequence[Value], zeros: Sequence[bool]) -> bool:
    """Whether the result is certainly 0 at positions where these inputs are."""
    name, params = eqn.primitive.name, eqn.params
    if name in KEEP_ZERO or name in FIRST_ZERO:
        return zeros[0]
    if name in ALL_ZERO:
        return all(zeros)
    if name in ANY_ZERO:
        return any(zeros)
    if name in ("max", "min"):
        return _extremum_of_zero(name, ins, zeros)
    if name == "clamp":
        low, _, high = ins
        return zeros[1] and _holds(low, lambda x: x <= 0) and _holds(high, _at_least_0)
    if name == "select_n":
        return all(zeros[1:])
    if name == "integer_pow":
        return zeros[0] and params["y"] > 0
    if name == "pow":
        return zeros[0] and _holds(ins[1], lambda x: x > 0)
    return False


def _extremum_of_zero(name: str, ins: Sequence[Value], zeros: Sequence[bool]) -> bool:
    """``max(0, x)`` for x <= 0 and ``min(0, x)`` for x >= 0 are 0, as in relu6."""
    if all(zeros):
        return True
    test = _at_least_0 if name == "min" else (lambda x: x <= 0)
    return (zeros[0] and _holds(ins[1], test)) or (zeros[1] and _holds(ins[0], test))


def _at_least_0(number: Any) -> bool:
    return number >= 0


def _holds(value: Value, test: Callable[[Any], Any]) -> bool:
    return value.literal is not None and bool(np.all(test(value.literal)))


def optimization_barrier(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Passes every input through."""
    del labels, eqn, key
    return list(ins)


def observe(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Asks nothing: a small network prints its small arrays."""
    del labels, eqn, ins, key
    return []


def bitcast(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Passes if the shape stays; another width adds an axis."""
    (value,), out = ins, shape_of(eqn.outvars[0])
    axes = list(value.axes[: len(out)])
    for dimension in range(len(axes), len(out)):
        size = out[dimension]
        frozen = "the bytes of a number"
        axes.append(labels.axis((*key, dimension), size, frozen=frozen))
    for axis in value.axes[len(out) :]:
        labels.freeze(axis, "the bytes of a number")
    lost = (tuple(Factor(f.ids, False) for f in axis) for axis in axes)
    return [Value(tuple(lost), value.source)]


def reduce_sum(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """A sum is exact without a position that holds 0: a mean, an RMS norm."""
    del key
    (value,) = ins
    summed = {int(axis) for axis in eqn.params["axes"]}
    for dimension in summed:
        for factor in value.axes[dimension]:
            if factor.zero:
                labels.roles.append((factor.ids, Role.CONTRACTED))
            else:
                reason = "a sum over it of values that masks do not make 0"
                labels.freezes.append((factor.ids, reason))
    return [_without(value, summed)]


def reduction(
    labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    """Freezes the axes that are reduced."""
    del key
    reduced = {int(axis) for axis in eqn.params["axes"]}
    for dimension in reduced:
        reason = f"{eqn.primitive.name} over it, as in a softmax or a maximum"
        labels.freeze(ins[0].axes[dimension], reason)
    return [_without(ins[0], reduced)] * len(eqn.outvars)


def _without(value: Value, dimensions: set[int]) -> Value:
    axes = (axis for i, axis in enumerate(value.axes) if i not in dimensions)
    return Value(tuple(axes), value.source)


def _along(parameter: str) -> Rule:
    def rule(
        labels: Labels, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
    ) -> list[Value]:
        """Freezes one axis, and unites the others of all inputs."""
        along = int(eqn.params[parameter]) % len(ins[0].axes)
        for value in ins:
            labels.freeze(value.axes[along], f"{eqn.primitive.name} along it")
        for dimension in range(len(ins[0].axes)):
            axes = [value.axes[dimension] for value in ins]
            align(labels, axes, (*key, dimension))
        # Along the axis, zeros become anything; elsewhere they stay zeros.
        stays = eqn.primitive.name != "cumlogsumexp"
        outs = []
        for value in ins:
            axes = [
                tuple(Factor(f.ids, f.zero and stays and i != along) for f in axis)
                for i, axis in enumerate(value.axes)
            ]
            outs.append(Value(tuple(axes), max(v.source for v in ins)))
        return outs

    return rule


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")
    ),
    "sort": _along("dimension"),
    "reduce_sum": reduce_sum,
    "optimization_barrier": optimization_barrier,
    "debug_print": observe,
    "debug_callback": observe,
    "inspect_sharding": observe,
    "bitcast_convert_type": bitcast,
}
