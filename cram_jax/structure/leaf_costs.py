"""How many multiply-adds each parameter takes part in."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex

from cram_jax.paths import named_leaves
from cram_jax.structure.contracted import find_contractions
from cram_jax.structure.costs import turns
from cram_jax.structure.equations import shape_of
from cram_jax.structure.trace import read_program


def multiply_adds(
    apply: Callable[[Any, Any], Any], params: Any, batch: Any
) -> dict[str, int]:
    """Counts the multiply-adds of each parameter in one call.

    In an engine that skips zeros, a kernel pruned to a share of its weights takes that
    share of them. Parameters that no contraction reads are not counted, nor are
    products of activations, as in attention. The program is traced, not run.

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
    contractions, _ = find_contractions(analysis, len(paths))
    counts: dict[str, int] = {}
    for key, contraction in contractions.items():
        path = paths[contraction.leaf]
        count = _products(analysis.equations[key].eqn) * turns(analysis, key)
        counts[path] = counts.get(path, 0) + count
    return {path: counts[path] for path in paths if path in counts}


def _products(eqn: jex.JaxprEqn) -> int:
    outputs = math.prod(shape_of(eqn.outvars[0]))
    if eqn.primitive.name == "dot_general":
        (summed, _), _ = eqn.params["dimension_numbers"]
        shape = shape_of(eqn.invars[0])
        return outputs * math.prod(shape[int(i)] for i in summed)
    _, inputs, *window = eqn.params["dimension_numbers"].rhs_spec
    shape = shape_of(eqn.invars[1])
    return outputs * math.prod(shape[i] for i in (inputs, *window))
