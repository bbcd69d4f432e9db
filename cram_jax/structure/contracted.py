"""Which contraction of a traced program multiplies which parameter by activations."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from cram_jax.structure.equations import shape_of
from cram_jax.structure.interpret import Analysis, called
from cram_jax.structure.labels import Axis, Key, Source

MOVES = frozenset(
    [
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "copy_p",
        "name",
        "reshape",
        "sharding_constraint",
        "squeeze",
        "stop_gradient",
        "transpose",
    ]
)
"""Operations that rearrange the entries of their input."""


class Place(NamedTuple):
    """A part of an axis of a parameter.

    Attributes:
      axis: number of the axis.
      part: which of its parts, outer to inner.
      size: how many positions it has.
    """

    axis: int
    part: int
    size: int


class Contraction(NamedTuple):
    """How an equation sums over the axes of a parameter.

    Attributes:
      leaf: number of the parameter.
      side: which operand it is, 0 or 1.
      stack: parts of the axes that the operands share, in the order of the operand.
      rows: parts of the axes that are summed over, in the order of the operand; of a
        convolution its inputs, then its windows.
      windows: numbers of the axes that are windows of a convolution.
      scans: the loops that slice the parameter, outer to inner.
      stack_axes: numbers of the axes that are shared or that loops slice.
    """

    leaf: int
    side: int
    stack: tuple[Place, ...]
    rows: tuple[Place, ...]
    windows: frozenset[int]
    scans: tuple[Key, ...]
    stack_axes: tuple[int, ...]

    @property
    def use(self) -> tuple[Any, ...]:
        """What must be equal for two uses of a parameter to share a sum."""
        axes = frozenset(place.axis for place in self.rows)
        return axes, self.windows, self.scans, self.stack_axes


class Origin(NamedTuple):
    """The parameter that a value is a rearrangement of.

    Attributes:
      leaf: its number.
      scans: the loops that slice it.
      sliced: the parts that they slice away.
    """

    leaf: int
    scans: tuple[Key, ...] = ()
    sliced: tuple[Place, ...] = ()


def find_contractions(
    analysis: Analysis, leaves: int
) -> tuple[dict[Key, Contraction], dict[int, str]]:
    """Finds the equations that multiply parameters with activations.

    Args:
      analysis: the labelled program, whose first inputs are the parameters.
      leaves: how many parameters there are.

    Returns:
      The contractions by the path of their equation, and why parameters that are also
      used in another way have none.
    """
    finder = _Finder(analysis, leaves)
    inputs = len(analysis.program.jaxpr.invars)
    origins = [Origin(i) if i < leaves else None for i in range(inputs)]
    finder.run(analysis.program.jaxpr, origins, ())
    by_leaf: dict[int, Contraction] = {}
    for contraction in finder.found.values():
        first = by_leaf.setdefault(contraction.leaf, contraction)
        if first.use != contraction.use:
            finder.refuse(Origin(contraction.leaf), "it is summed over in two ways")
    found = {
        key: contraction
        for key, contraction in finder.found.items()
        if contraction.leaf not in finder.obstacles
    }
    return found, finder.obstacles


class _Finder:
    def __init__(self, analysis: Analysis, leaves: int) -> None:
        self.analysis = analysis
        self.found: dict[Key, Contraction] = {}
        self.obstacles: dict[int, str] = {}
        self.parts = [
            {
                int(factor.ids[0]): Place(axis, part, len(factor.ids))
                for axis, factors in enumerate(value.axes)
                for part, factor in enumerate(factors)
            }
            for value in analysis.inputs[:leaves]
        ]

    def refuse(self, origin: Origin | None, reason: str) -> None:
        if origin is not None:
            self.obstacles.setdefault(origin.leaf, reason)

    def run(
        self, jaxpr: jex.Jaxpr, args: Sequence[Origin | None], path: Key
    ) -> list[Origin | None]:
        """What the outputs of a program are rearrangements of."""
        origins: dict[Any, Origin | None] = dict(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Origin | None:
            return None if isinstance(atom, jex.Literal) else origins.get(atom)

        for i, eqn in enumerate(jaxpr.eqns):
            ins = [read(atom) for atom in eqn.invars]
            if any(ins):
                outs = self._equation(eqn, ins, (*path, i))
                origins.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: jex.JaxprEqn, ins: Sequence[Origin | None], key: Key
    ) -> Sequence[Origin | None]:
        name = eqn.primitive.name
        inner = called(eqn)
        if inner is not None:
            return self.run(inner.jaxpr, ins, key)
        if name in MOVES and _size(eqn.invars[0]) == _size(eqn.outvars[0]):
            return [ins[0]]
        nothing = [None] * len(eqn.outvars)
        if name == "scan":
            self._scan(eqn, ins, key)
            return nothing
        for side, origin in enumerate(ins):
            if origin is None:
                continue
            if name == "dot_general":
                found = self._dot_general(eqn, origin, side, key)
            elif name == "conv_general_dilated":
                found = self._convolution(eqn, origin, side, key)
            else:
                found = f"it meets {name} before a contraction"
            if isinstance(found, str):
                self.refuse(origin, found)
            else:
                self.found[key] = found
        return nothing

    def _scan(self, eqn: jex.JaxprEqn, ins: Sequence[Origin | None], key: Key) -> None:
        first = eqn.params["num_consts"]
        last = first + eqn.params["num_carry"]
        inside: list[Origin | None] = [*ins[:first]]
        for origin in ins[first:last]:
            self.refuse(origin, "a loop carries it")
            inside.append(None)
        values = self.analysis.equations[key].ins[last:]
        for origin, value in zip(ins[last:], values, strict=True):
            if origin is not None:
                sliced = self._places(origin, [value.axes[0]])
                if sliced is None:
                    self.refuse(origin, "a loop slices a part of its axes")
                    origin = None
                else:
                    origin = Origin(
                        origin.leaf,
                        (*origin.scans, key),
                        (*origin.sliced, *sliced),
                    )
            inside.append(origin)
        self.run(eqn.params["jaxpr"].jaxpr, inside, key)

    def _dot_general(
        self, eqn: jex.JaxprEqn, origin: Origin, side: int, key: Key
    ) -> Contraction | str:
        contracted, batch = eqn.params["dimension_numbers"]
        return self._contraction(
            origin, side, key, batch=batch[side], rows=contracted[side]
        )

    def _convolution(
        self, eqn: jex.JaxprEqn, origin: Origin, side: int, key: Key
    ) -> Contraction | str:
        if side == 0:
            return "a convolution reads it as its image"
        groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
        if groups != (1, 1):
            return "it is the kernel of a grouped convolution"
        _, inputs, *window = eqn.params["dimension_numbers"].rhs_spec
        return self._contraction(
            origin, side, key, rows=(inputs, *window), window=window
        )

    def _contraction(
        self,
        origin: Origin,
        side: int,
        key: Key,
        *,
        rows: Sequence[int],
        batch: Sequence[int] = (),
        window: Sequence[int] = (),
    ) -> Contraction | str:
        values = self.analysis.equations[key].ins
        if values[1 - side].source is not Source.ACTIVATION:
            return "it is multiplied with other parameters or constants"
        axes = values[side].axes
        free = [i for i in range(len(axes)) if i not in {*rows, *batch}]
        stack, summed, others, windows = (
            self._places(origin, [axes[int(i)] for i in dimensions])
            for dimensions in (batch, rows, free, window)
        )
        if stack is None or summed is None or others is None or windows is None:
            return "it is not as a whole in one contraction"
        layers = (*origin.sliced, *stack)
        groups = [{place.axis for place in part} for part in (layers, summed, others)]
        if sum(map(len, groups)) > len(set().union(*groups)):
            return "an axis of it is only partly summed over"
        if len({*layers, *summed, *others}) < len(self.parts[origin.leaf]):
            return "only a part of it is in one contraction"
        if [*origin.sliced, *sorted(stack)] != sorted(layers):
            return "its stacked axes are taken in another order"
        return Contraction(
            origin.leaf,
            side,
            tuple(stack),
            tuple(summed),
            frozenset(place.axis for place in windows),
            origin.scans,
            tuple(sorted({place.axis for place in layers})),
        )

    def _places(self, origin: Origin, axes: Sequence[Axis]) -> list[Place] | None:
        """The parts of the parameter along these axes; None if there are none."""
        known = self.parts[origin.leaf]
        places = []
        for factor in (factor for axis in axes for factor in axis):
            place = known.get(int(factor.ids[0]))
            if place is None or place.size != len(factor.ids):
                return None
            places.append(place)
        return places


def _size(atom: Any) -> int:
    return math.prod(shape_of(atom))
