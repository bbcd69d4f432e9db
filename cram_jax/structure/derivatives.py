"""Derivative rules that a model brings along, kept when its equations are made smaller.

The rule of the dense equation is traced, labelled and replayed in its turn: straight
through estimators and the gradient of relu at 0 stay what they are.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.structure.equations import as_function, dtype_of, shape_of
from cram_jax.structure.interpret import Input, Labelled, analyse, called
from cram_jax.structure.labels import Key, Value
from cram_jax.structure.resizing import ReplayRule

if TYPE_CHECKING:
    from cram_jax.structure.replay import Replay


class Operand(NamedTuple):
    """An input of a derivative's program.

    Attributes:
      shape: dense.
      labels: of the value that it is, or that it is a change of.
      value: small.
      zero: whether it is surely 0 where positions were removed.
    """

    shape: jax.ShapeDtypeStruct
    labels: Value
    value: Any
    zero: bool


def _custom_jvp(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    inner = called(labelled.eqn)
    assert inner is not None
    places = _inexact(labelled.eqn.invars)
    varying = _inexact(labelled.eqn.outvars)

    def derivative(*inputs: Any) -> list[Any]:
        values, tangents = inputs[: len(args)], inputs[len(args) :]
        function = _of_places(as_function(labelled.eqn), values, places)
        outs, changes = jax.jvp(function, [values[i] for i in places], list(tangents))
        return [*outs, *(changes[i] for i in varying)]

    @jax.custom_jvp
    def function(*values: Any) -> list[Any]:
        return replay.run(inner.jaxpr, inner.consts, values, key)

    @function.defjvp
    def rule(
        values: tuple[Any, ...], tangents: tuple[Any, ...]
    ) -> tuple[list[Any], list[Any]]:
        changes = [
            _change(labelled.eqn.invars[i], labelled.ins[i], tangents[i])
            for i in places
        ]
        outs = _replay_program(
            derivative, [*_operands(labelled, values), *changes], replay
        )
        count = len(labelled.outs)
        by_place = dict(zip(varying, outs[count:], strict=True))
        return outs[:count], [
            by_place[i] if i in by_place else _no_change(out)
            for i, out in enumerate(outs[:count])
        ]

    return function(*args)


def _custom_vjp(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    inner = called(labelled.eqn)
    assert inner is not None
    places = _inexact(labelled.eqn.invars)
    varying = _inexact(labelled.eqn.outvars)

    def derivative(*inputs: Any) -> list[Any]:
        values, cotangents = inputs[: len(args)], inputs[len(args) :]
        function = _of_places(as_function(labelled.eqn), values, places, varying)
        _, pull_back = jax.vjp(function, *(values[i] for i in places))
        return list(pull_back(list(cotangents)))

    @jax.custom_vjp
    def function(*values: Any) -> list[Any]:
        return replay.run(inner.jaxpr, inner.consts, values, key)

    def forward(*values: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return function(*values), values

    def backward(values: tuple[Any, ...], cotangents: list[Any]) -> tuple[Any, ...]:
        changes = [
            _change(labelled.eqn.outvars[i], labelled.outs[i], cotangents[i])
            for i in varying
        ]
        operands = [*_operands(labelled, values), *changes]
        gradients = iter(_replay_program(derivative, operands, replay))
        return tuple(
            next(gradients) if i in places else _no_change(value)
            for i, value in enumerate(values)
        )

    function.defvjp(forward, backward)
    return function(*args)


def _inexact(variables: Sequence[Any]) -> list[int]:
    """The places of real and complex numbers; only these have derivatives."""
    return [
        i
        for i, variable in enumerate(variables)
        if jnp.issubdtype(dtype_of(variable), jnp.inexact)
    ]


def _of_places(
    function: Callable[..., list[Any]],
    values: Sequence[Any],
    places: Sequence[int],
    outs: Sequence[int] | None = None,
) -> Callable[..., list[Any]]:
    """The function of some of its arguments, the others being held."""

    def varied(*chosen: Any) -> list[Any]:
        new = list(values)
        for place, value in zip(places, chosen, strict=True):
            new[place] = value
        results = function(*new)
        return results if outs is None else [results[i] for i in outs]

    return varied


def _operands(labelled: Labelled, values: Sequence[Any]) -> list[Operand]:
    return [
        Operand(
            _struct(atom),
            labels,
            value,
            all(factor.zero for axis in labels.axes for factor in axis),
        )
        for atom, labels, value in zip(
            labelled.eqn.invars, labelled.ins, values, strict=True
        )
    ]


def _change(variable: Any, labels: Value, value: Any) -> Operand:
    """What is removed does not change: its derivative is 0."""
    return Operand(_struct(variable), labels, value, zero=True)


def _struct(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape_of(variable), dtype_of(variable))


def _no_change(value: Any) -> Any:
    return np.zeros(np.shape(value), jax.dtypes.float0)


def _replay_program(
    function: Callable[..., list[Any]], operands: Sequence[Operand], replay: "Replay"
) -> list[Any]:
    """Traces a function of dense operands and replays it on the small ones."""
    program = jax.make_jaxpr(function)(*(operand.shape for operand in operands))
    inputs = [Input(operand.labels.source, operand.zero) for operand in operands]
    analysis = analyse(program, inputs, [None] * len(program.jaxpr.outvars))
    positions = [
        [replay.positions(axis) for axis in operand.labels.axes] for operand in operands
    ]
    return replay.of(analysis, positions)([operand.value for operand in operands])


RULES: dict[str, ReplayRule] = {
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "custom_vjp_call_jaxpr": _custom_vjp,
}
