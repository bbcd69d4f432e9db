"""A model's own derivative rules, kept when its equations are made smaller.

The rule of the dense equation is itself traced, labelled and replayed: straight-through
estimators and the gradient of relu at 0 are preserved.
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
      labels: of the value, or of the value that it is a change of.
      value: small.
      zero: whether it is certainly 0 where positions were removed.
    """

    shape: jax.ShapeDtypeStruct
    labels: Value
    value: Any
    zero: bool


class CustomRule:
    """An equation with a derivative rule of its own, on smaller arrays.

    Args:
      replay: what it is part of.
      labelled: the dense equation.
      key: where it was labelled.
    """

    def __init__(self, replay: "Replay", labelled: Labelled, key: Key) -> None:
        self.replay, self.labelled, self.key = replay, labelled, key
        self.places = _inexact(labelled.eqn.invars)
        self.varying = _inexact(labelled.eqn.outvars)

    def primal(self, *values: Any) -> list[Any]:
        """The outputs."""
        inner = called(self.labelled.eqn)
        assert inner is not None
        return self.replay.run(inner.jaxpr, inner.consts, values, self.key)

    def push_forward(
        self, values: tuple[Any, ...], tangents: tuple[Any, ...]
    ) -> tuple[list[Any], list[Any]]:
        """The outputs, and how they change with the inputs."""

        def dense(values: Sequence[Any], changes: Sequence[Any]) -> list[Any]:
            function = self._of_places(values)
            outs, changed = jax.jvp(
                function, [values[i] for i in self.places], list(changes)
            )
            return [*outs, *(changed[i] for i in self.varying)]

        eqn, labels = self.labelled.eqn, self.labelled.ins
        changes = [_change(eqn.invars[i], labels[i], tangents[i]) for i in self.places]
        results = self._derive(dense, values, changes)
        outs = results[: len(eqn.outvars)]
        return outs, _filled(outs, self.varying, results[len(outs) :])

    def pull_back(
        self, values: tuple[Any, ...], cotangents: list[Any]
    ) -> tuple[Any, ...]:
        """The gradients of the inputs, from those of the outputs."""

        def dense(values: Sequence[Any], changes: Sequence[Any]) -> list[Any]:
            function = self._of_places(values, self.varying)
            _, pull = jax.vjp(function, *(values[i] for i in self.places))
            return list(pull(list(changes)))

        eqn, labels = self.labelled.eqn, self.labelled.outs
        changes = [
            _change(eqn.outvars[i], labels[i], cotangents[i]) for i in self.varying
        ]
        gradients = self._derive(dense, values, changes)
        return tuple(_filled(values, self.places, gradients))

    def _of_places(
        self, values: Sequence[Any], outs: Sequence[int] | None = None
    ) -> Callable[..., list[Any]]:
        """The dense equation as a function of its real and complex inputs."""
        function = as_function(self.labelled.eqn)

        def varied(*chosen: Any) -> list[Any]:
            new = list(values)
            for place, value in zip(self.places, chosen, strict=True):
                new[place] = value
            results = function(*new)
            return results if outs is None else [results[i] for i in outs]

        return varied

    def _derive(
        self,
        dense: Callable[..., list[Any]],
        values: Sequence[Any],
        changes: Sequence[Operand],
    ) -> list[Any]:
        """Applies a dense function of values and changes to the small ones."""
        count = len(values)
        operands = [*_operands(self.labelled, values), *changes]

        def function(*inputs: Any) -> list[Any]:
            return dense(inputs[:count], inputs[count:])

        return _replay_program(function, operands, self.replay)


def _custom_jvp(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> Any:
    rule = CustomRule(replay, labelled, key)
    function = jax.custom_jvp(rule.primal)
    function.defjvp(rule.push_forward)
    return function(*args)


def _custom_vjp(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> Any:
    rule = CustomRule(replay, labelled, key)
    function = jax.custom_vjp(rule.primal)
    function.defvjp(lambda *values: (function(*values), values), rule.pull_back)
    return function(*args)


def _inexact(variables: Sequence[Any]) -> list[int]:
    """The places of real and complex numbers; only these have derivatives."""
    return [
        i
        for i, variable in enumerate(variables)
        if jnp.issubdtype(dtype_of(variable), jnp.inexact)
    ]


def _filled(
    values: Sequence[Any], places: Sequence[int], changes: Sequence[Any]
) -> list[Any]:
    """Changes at their places among the values; integers have none."""
    by_place = dict(zip(places, changes, strict=True))
    return [
        by_place[i] if i in by_place else np.zeros(np.shape(value), jax.dtypes.float0)
        for i, value in enumerate(values)
    ]


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
    """Removed positions do not change, so their derivative is 0."""
    return Operand(_struct(variable), labels, value, zero=True)


def _struct(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape_of(variable), dtype_of(variable))


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
