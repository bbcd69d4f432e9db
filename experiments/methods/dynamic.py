"""Dynamic sparse training: RigL and SET. Every layer keeps its number of weights."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cram_jax import MaskRule, Step, Where, keep_largest, prunable


def rigl(
    sparsity: float,
    *,
    replaced: optax.Schedule | float = 0.3,
    grow: Literal["gradient", "random"] = "gradient",
    densities: Literal["uniform", "erk"] = "erk",
    where: Where | None = None,
) -> MaskRule:
    r"""Replaces the smallest of the kept weights by those with the largest gradients.

    In a layer with :math:`a` kept weights and :math:`d = \lfloor \alpha_t a \rfloor`,
    the :math:`a - d` largest :math:`|w|` stay, and of all others the :math:`d` with the
    largest :math:`|\nabla L|` are kept from now on; of SET, random ones. They start at
    zero (a weight that is dropped in the same renewal keeps its value).

    The masks start at random: apply them to the parameters first. The gradient has to
    be the dense one at the sparse weights, as `cram_jax.pruned` gets it. The authors
    take no gradient step when they renew; here the step comes first.

    Args:
      sparsity: over all layers together.
      replaced: :math:`\alpha_t`, or a schedule of the step count.
      grow: by "gradient" (RigL) or "random" (SET).
      densities: the same for all layers, or "erk" (Erdos-Renyi-kernel), which keeps
        more of small layers.
      where: which leaves, see `cram_jax.prunable`.

    Returns:
      A rule for `cram_jax.pruned`, with ``every=100`` in the paper.

    Example:
      >>> optimizer = cram_jax.pruned(optax.sgd(0.1), rigl(0.9), every=100)

    References: Evci et al., Rigging the lottery, ICML 2020, algorithm 1, arXiv
      1911.11134; Mocanu et al., SET, Nature Communications 2018, arXiv 1707.04780.
    """

    def init(params: Any, key: jax.Array) -> tuple[Any, Any]:
        leaves = jax.tree.leaves(params)
        structure: Any = jax.tree.structure(params)
        if not leaves:  # the placeholder of optax.tree.map_params
            return params, ()
        chosen = prunable(params, where)
        kept = iter(
            kept_by_layer(
                [leaf.shape for leaf, c in zip(leaves, chosen, strict=True) if c],
                sparsity,
                densities,
            )
        )
        masks = [
            _largest(jax.random.uniform(jax.random.fold_in(key, i), leaf.shape), count)
            if is_chosen and (count := next(kept)) < leaf.size
            else jnp.ones_like(leaf, bool)
            for i, (leaf, is_chosen) in enumerate(zip(leaves, chosen, strict=True))
        ]
        return structure.unflatten(masks), ()

    def renew(masks: Any, state: Any, step: Step) -> tuple[Any, Any]:
        share = replaced(step.count) if callable(replaced) else replaced
        leaves = jax.tree.leaves(masks)
        structure: Any = jax.tree.structure(masks)
        chosen = prunable(step.params, where)
        renewed = [
            _replace(
                mask,
                weights,
                jnp.abs(gradient)
                if grow == "gradient"
                else jax.random.uniform(jax.random.fold_in(step.key, i), mask.shape),
                share,
            )
            if is_chosen
            else mask
            for i, (mask, weights, gradient, is_chosen) in enumerate(
                zip(
                    leaves,
                    jax.tree.leaves(step.params),
                    jax.tree.leaves(step.gradients),
                    chosen,
                    strict=True,
                )
            )
        ]
        return structure.unflatten(renewed), state

    return MaskRule(init, renew)


def annealed(replaced: float, end: int) -> optax.Schedule:
    """Half a cosine from a share to 0 at ``end``, after which masks stay."""

    def schedule(count: Any) -> jax.Array:
        progress = jnp.minimum(count / end, 1)
        return replaced / 2 * (1 + jnp.cos(jnp.pi * progress))

    return schedule


def kept_by_layer(
    shapes: Sequence[tuple[int, ...]],
    sparsity: float,
    densities: Literal["uniform", "erk"] = "erk",
) -> list[int]:
    """How many weights each layer keeps.

    With "erk" the density of a layer is proportional to the sum of its dimensions over
    their product; those that would be above 1 are dense, and the others share the rest.

    Example:
      >>> kept_by_layer([(3, 3, 1, 4), (3, 3, 4, 4), (4, 2)], 0.5)
      [33, 57, 8]
    """
    sizes = np.array([math.prod(shape) for shape in shapes], float)
    if densities == "uniform":
        return [round(size * (1 - sparsity)) for size in sizes]
    raw = np.array([sum(shape) for shape in shapes]) / np.maximum(sizes, 1)
    dense = sizes == 0
    while True:
        rest = (1 - sparsity) * sizes.sum() - sizes[dense].sum()
        scale = rest / (raw * sizes)[~dense].sum()
        above = ~dense & (scale * raw > 1)
        if not above.any():
            break
        dense |= above
    density = np.where(dense, 1, scale * raw)
    return [round(size) for size in density * sizes]


def _replace(
    mask: jax.Array, weights: jax.Array, growth: jax.Array, share: Any
) -> jax.Array:
    number = mask.sum()
    dropped = jnp.floor(share * number).astype(int)
    # Below zero, so that none of those that are out comes first.
    kept = _largest(jnp.where(mask, jnp.abs(weights), -1), number - dropped)
    return kept | _largest(jnp.where(kept, -1, growth), dropped)


def _largest(values: jax.Array, count: Any) -> jax.Array:
    return keep_largest([values], count, signed=True)[0]
