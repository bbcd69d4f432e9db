"""Parameters and multiply-adds of a model, as functions of what is kept."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from cram_jax.structure.equations import shape_of
from cram_jax.structure.interpret import Analysis, Labelled
from cram_jax.structure.labels import Axis, Ids, Key


class Term(NamedTuple):
    """A product: a constant times the sizes of some axes.

    Attributes:
      constant: the factor that never changes.
      parts: numbers of the parts, whose sizes are multiplied.
    """

    constant: int
    parts: tuple[int, ...]


class Costs(NamedTuple):
    """Sums of products of sizes.

    Attributes:
      parts: for each part of an axis that can become smaller, the groups of its
        positions; -1 for positions that stay.
      parameters: terms that add up to the number of parameters.
      multiply_adds: terms that add up to those of one call with the traced inputs; a
        loop of unknown length counts once, and every branch of a ``lax.cond``.
    """

    parts: tuple[Ids, ...]
    parameters: tuple[Term, ...]
    multiply_adds: tuple[Term, ...]


def total(terms: Sequence[Term], parts: Sequence[Ids], kept: Any = None) -> int:
    """The cost with these groups kept; all of them by default."""
    sizes = [
        len(part) if kept is None else int(np.where(part < 0, True, kept[part]).sum())
        for part in parts
    ]
    return sum(t.constant * math.prod(sizes[part] for part in t.parts) for t in terms)


def share(terms: Sequence[Term], parts: Sequence[Ids], kept: jax.Array) -> jax.Array:
    """The share of the dense cost that is left, for traced groups, in float32."""
    dense = total(terms, parts)
    sizes = [jnp.sum(jnp.where(part < 0, True, kept[part])) for part in parts]
    shares = [size / len(part) for size, part in zip(sizes, parts, strict=True)]
    left = jnp.float32(0)
    for term in terms:
        weight = term.constant * math.prod(len(parts[part]) for part in term.parts)
        product = jnp.float32(weight / dense)
        for part in term.parts:
            product = product * shares[part]
        left = left + product
    return left


class Counter:
    """Collects terms over parts of axes, each part once.

    Args:
      group_of: the group of each label, -1 where it stays.
    """

    def __init__(self, group_of: Ids) -> None:
        self.group_of = group_of
        self.parts: dict[bytes, tuple[int, Ids]] = {}

    def term(self, constant: int, axes: Iterable[Axis]) -> Term:
        """The product of a constant and the sizes of the axes."""
        numbers = []
        for axis in axes:
            for factor in axis:
                groups = self.group_of[factor.ids]
                if (groups < 0).all():
                    constant *= len(groups)
                else:
                    fresh = (len(self.parts), groups)
                    numbers.append(self.parts.setdefault(groups.tobytes(), fresh)[0])
        return Term(constant, tuple(numbers))


def count_costs(analysis: Analysis, group_of: Ids, leaves: int) -> Costs:
    """The costs of a labelled program whose first inputs are the parameters."""
    counter = Counter(group_of)
    parameters = [counter.term(1, value.axes) for value in analysis.inputs[:leaves]]
    products = [
        term
        for key, labelled in analysis.equations.items()
        if (term := _products(counter, labelled, turns(analysis, key))) is not None
    ]
    return Costs(
        tuple(groups for _, groups in counter.parts.values()),
        _merged(parameters),
        _merged(products),
    )


def _merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    constants: dict[tuple[int, ...], int] = {}
    for term in terms:
        parts = tuple(sorted(term.parts))
        constants[parts] = constants.get(parts, 0) + term.constant
    return tuple(Term(constant, parts) for parts, constant in constants.items())


def turns(analysis: Analysis, key: Key) -> int:
    """How often an equation runs: the product of the lengths of its scans."""
    turns = 1
    for end in range(1, len(key)):
        outer = analysis.equations.get(key[:end])
        if outer is not None and outer.eqn.primitive.name == "scan":
            turns *= int(outer.eqn.params["length"])
    return turns


def _products(counter: Counter, labelled: Labelled, turns: int) -> Term | None:
    eqn: jex.JaxprEqn = labelled.eqn
    if eqn.primitive.name == "dot_general":
        (_, summed), (_, batch) = eqn.params["dimension_numbers"]
        left, right = labelled.ins
        free = [
            axis
            for i, axis in enumerate(right.axes)
            if i not in {int(d) for d in (*summed, *batch)}
        ]
        return counter.term(turns, [*left.axes, *free])
    if eqn.primitive.name == "conv_general_dilated":
        spec = eqn.params["dimension_numbers"]
        positions = shape_of(eqn.outvars[0])
        batch, _, *spatial = spec.out_spec
        constant = turns * math.prod(positions[d] for d in (batch, *spatial))
        return counter.term(constant, labelled.ins[1].axes)
    return None
