"""How many multiply-adds each parameter takes part in."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend import core as jex

from cram_jax.paths import named_leaves
from cram_jax.structure.contracted import MOVES
from cram_jax.structure.costs import turns
from cram_jax.structure.elementwise import KEEP_ZERO
from cram_jax.structure.equations import shape_of
from cram_jax.structure.interpret import Analysis, called
from cram_jax.structure.labels import Key, Source
from cram_jax.structure.trace import read_program

Owner: TypeAlias = int | None
"""The number of the one parameter that a value is made of; else None."""

PARTS = frozenset(["dynamic_slice", "rev", "slice", "split", "unstack"])
CONTRACTIONS = frozenset(["conv_general_dilated", "dot_general"])


def multiply_adds(
    apply: Callable[[Any, Any], Any], params: Any, batch: Any
) -> dict[str, int]:
    """Counts the multiply-adds of each parameter in one call.

    In an engine that skips zeros, a kernel pruned to a share of its weights takes that
    share of them. A kernel counts if its entries are only rearranged, split, scaled or
    mapped from 0 to 0 before they are multiplied with activations. Parameters that no
    contraction reads are not counted, nor are products of activations, as in attention,
    or of several parameters, as in low-rank kernels. A loop of unknown length counts
    once, and every branch of a ``lax.cond``. The program is traced, not run.

    Args:
      apply: ``(params, batch) -> anything``, as for `input_grams`.
      params: a pytree of arrays, or of anything with a shape and a dtype.
      batch: likewise; with one example, the counts are those for an example.

    Returns:
      The multiply-adds of each parameter, by path, in the order of the leaves.

    Example:
      >>> from cram_jax.structure import multiply_adds
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> multiply_adds(apply, params, jnp.ones((1, 3)))
      {'a': 12, 'b': 8}
    """
    paths = [path for path, _ in named_leaves(params)]
    abstract = jax.eval_shape(lambda *trees: trees, params, batch)
    analysis, _ = read_program(apply, abstract[0], (abstract[1],), None)
    program = analysis.program.jaxpr
    owners = [i if i < len(paths) else None for i in range(len(program.invars))]
    counter = _Counter(analysis)
    counter.run(program, owners, ())
    return {paths[leaf]: counter.counts[leaf] for leaf in sorted(counter.counts)}


class _Counter:
    """Follows the parameters to the contractions that read them."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.counts: dict[int, int] = {}

    def run(
        self, jaxpr: jex.Jaxpr, args: Sequence[Owner], path: Key
    ) -> Sequence[Owner]:
        """The owners of a program's outputs."""
        owners: dict[Any, Owner] = dict(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Owner:
            return None if isinstance(atom, jex.Literal) else owners.get(atom)

        for i, eqn in enumerate(jaxpr.eqns):
            ins = [read(atom) for atom in eqn.invars]
            if any(owner is not None for owner in ins):
                outs = self._equation(eqn, ins, (*path, i))
                owners.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: jex.JaxprEqn, ins: Sequence[Owner], key: Key
    ) -> Sequence[Owner]:
        name = eqn.primitive.name
        inner = called(eqn)
        if inner is not None:
            return self.run(inner.jaxpr, ins, key)
        if name in CONTRACTIONS:
            self._count(eqn, ins, key)
        elif name in ("scan", "while", "cond"):
            self._enter(eqn, ins, key)
        elif name in PARTS:
            return [ins[0]] * len(eqn.outvars)
        elif name in ("mul", "div"):
            return [self._scaled(eqn, ins, key)]
        elif name in MOVES | KEEP_ZERO and _size(eqn.invars[0]) == _size(
            eqn.outvars[0]
        ):
            return [ins[0]]
        return [None] * len(eqn.outvars)

    def _enter(self, eqn: jex.JaxprEqn, ins: Sequence[Owner], key: Key) -> None:
        params = eqn.params
        nothing: list[Owner] = [None] * len(ins)
        if eqn.primitive.name == "scan":
            first = params["num_consts"]
            last = first + params["num_carry"]
            args = [*ins[:first], *nothing[first:last], *ins[last:]]
            self.run(params["jaxpr"].jaxpr, args, key)
        elif eqn.primitive.name == "while":
            first = params["cond_nconsts"]
            last = first + params["body_nconsts"]
            args = [*ins[first:last], *nothing[last:]]
            self.run(params["body_jaxpr"].jaxpr, args, (*key, "body"))
        else:
            for i, branch in enumerate(params["branches"]):
                self.run(branch.jaxpr, ins[1:], (*key, i))

    def _scaled(self, eqn: jex.JaxprEqn, ins: Sequence[Owner], key: Key) -> Owner:
        """The owner of a product: the one parameter that has all of its entries."""
        values = self.analysis.equations[key].ins
        if any(value.source is Source.ACTIVATION for value in values):
            return None
        size = _size(eqn.outvars[0])
        factors = ins[:1] if eqn.primitive.name == "div" else ins
        whole = {
            owner
            for owner, atom in zip(factors, eqn.invars, strict=False)
            if owner is not None and _size(atom) == size
        }
        return whole.pop() if len(whole) == 1 else None

    def _count(self, eqn: jex.JaxprEqn, ins: Sequence[Owner], key: Key) -> None:
        values = self.analysis.equations[key].ins
        for owner, other in zip(ins, reversed(values), strict=True):
            if owner is not None and other.source is Source.ACTIVATION:
                products = _products(eqn) * turns(self.analysis, key)
                self.counts[owner] = self.counts.get(owner, 0) + products


def _size(atom: Any) -> int:
    return math.prod(shape_of(atom))


def _products(eqn: jex.JaxprEqn) -> int:
    outputs = math.prod(shape_of(eqn.outvars[0]))
    if eqn.primitive.name == "dot_general":
        (summed, _), _ = eqn.params["dimension_numbers"]
        shape = shape_of(eqn.invars[0])
        return outputs * math.prod(shape[int(i)] for i in summed)
    # The inputs of a grouped kernel are those of one group.
    _, inputs, *window = eqn.params["dimension_numbers"].rhs_spec
    shape = shape_of(eqn.invars[1])
    return outputs * math.prod(shape[i] for i in (inputs, *window))
