"""Runs a labelled program on smaller arrays, with every size rewritten."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from cram_jax.structure import derivatives, resizing
from cram_jax.structure.equations import bind, evaluate
from cram_jax.structure.interpret import Analysis, Labelled, called
from cram_jax.structure.labels import Axis, Factor, Kept, Key, Value

RULES = {**resizing.RULES, **derivatives.RULES}


def keep_labels(analysis: Analysis, positions: Sequence[Sequence[Kept | None]]) -> Kept:
    """The labels that stay if these positions of the inputs do.

    Args:
      analysis: the labelled program.
      positions: for each input and axis, which positions stay; None for all of them.

    Returns:
      One bool for each label.

    Raises:
      ValueError: the program does not allow removing exactly these positions.
    """
    gone = np.zeros(analysis.labels.count, bool)
    for value, kept_axes in zip(analysis.inputs, positions, strict=True):
        for axis, kept in zip(value.axes, kept_axes, strict=True):
            if kept is not None:
                for factor, removed in _removed_of_factors(axis, ~kept):
                    gone[analysis.root[factor.ids[removed]]] = True
    for label in np.flatnonzero(gone):
        if int(label) in analysis.reasons:
            raise ValueError(
                "at these input shapes the model does not let a channel go that was "
                f"removed: {analysis.reasons[int(label)]}"
            )
    kept_labels: Kept = ~gone[analysis.root]
    for value, kept_axes in zip(analysis.inputs, positions, strict=True):
        for axis, kept in zip(value.axes, kept_axes, strict=True):
            wanted = np.ones(1, bool) if kept is None else kept
            if not (_kept_positions(axis, kept_labels) == wanted).all():
                raise ValueError(
                    "at these input shapes the model ties other channels together than "
                    "it did where it was traced; trace it at these shapes"
                )
    return kept_labels


def _removed_of_factors(axis: Axis, gone: Kept) -> list[tuple[Factor, Kept]]:
    """For each factor, the places of which every position of the axis goes."""
    grid = gone.reshape([len(factor.ids) for factor in axis])
    return [
        (factor, np.asarray(grid.all(axis=_all_but(i, len(axis)))))
        for i, factor in enumerate(axis)
    ]


def _all_but(place: int, count: int) -> tuple[int, ...]:
    return tuple(other for other in range(count) if other != place)


def _kept_positions(axis: Axis, kept: Kept) -> Kept:
    positions: Kept = np.ones(1, bool)
    for factor in axis:
        positions = (positions[:, None] & kept[factor.ids]).reshape(-1)
    return positions


class Replay:
    """A labelled program with the labels that stay: evaluates it on small arrays.

    Args:
      analysis: the labelled program.
      kept: one bool for each label.
    """

    def __init__(self, analysis: Analysis, kept: Kept) -> None:
        self.analysis = analysis
        self.kept = kept

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """The outputs, from the inputs with their removed positions cut out."""
        program = self.analysis.program
        return self.run(program.jaxpr, program.consts, values, ())

    @classmethod
    def of(
        cls, analysis: Analysis, positions: Sequence[Sequence[Kept | None]]
    ) -> "Replay":
        """The replay with these positions of the inputs; see `keep_labels`."""
        return cls(analysis, keep_labels(analysis, positions))

    def run(
        self, jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any], path: Key
    ) -> list[Any]:
        """The values of a program's outputs; `path` is where it was labelled."""
        values: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
        for i, (var, const) in enumerate(zip(jaxpr.constvars, consts, strict=True)):
            labels = self.analysis.constants[(*path, "const", i)]
            values[var] = self.cut(const, labels)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else values[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            key = (*path, i)
            outs = self._equation(eqn, [read(atom) for atom in eqn.invars], key)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: jex.JaxprEqn, args: Sequence[Any], key: Key
    ) -> Sequence[Any]:
        labelled = self.analysis.equations[key]
        if self._is_whole(labelled):
            return evaluate(eqn, args)
        if eqn.primitive.name in RULES:
            outs = RULES[eqn.primitive.name](self, labelled, args, key)
        elif (inner := called(eqn)) is not None:
            outs = self.run(inner.jaxpr, inner.consts, args, key)
        else:
            outs = bind(eqn, args)
        for out, value in zip(outs, labelled.outs, strict=True):
            if np.shape(out) != self.shape(value):
                raise AssertionError(
                    f"{eqn.primitive.name} gave {np.shape(out)} for {self.shape(value)}"
                )
        return outs

    def _is_whole(self, labelled: Labelled) -> bool:
        return all(
            self.kept[factor.ids].all()
            for value in (*labelled.ins, *labelled.outs)
            for axis in value.axes
            for factor in axis
        )

    def size(self, axis: Axis) -> int:
        """How many positions of the axis stay."""
        return math.prod(int(self.kept[factor.ids].sum()) for factor in axis)

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape that stays."""
        return tuple(self.size(axis) for axis in value.axes)

    def positions(self, axis: Axis) -> Kept:
        """Which positions of the axis stay."""
        return _kept_positions(axis, self.kept)

    def cut(self, array: Any, value: Value) -> Any:
        """The array without the positions that go."""
        for dimension, axis in enumerate(value.axes):
            positions = self.positions(axis)
            if not positions.all():
                array = jnp.take(array, np.flatnonzero(positions), axis=dimension)
        return array
