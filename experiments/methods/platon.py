"""PLATON: importance with an upper confidence bound."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cram_jax import MaskRule, Step, Where, keep_largest, prunable


class PlatonState(NamedTuple):
    """State of PLATON, each entry like the parameters.

    Attributes:
      window: mean of the sensitivity in this window.
      sensitivity: its moving average over windows.
      uncertainty: the moving average of how far windows are from it.
    """

    window: Any
    sensitivity: Any
    uncertainty: Any


def platon(
    sparsity: optax.Schedule,
    *,
    window: int = 10,
    final: int,
    decays: tuple[float, float] = (0.85, 0.95),
    where: Where | None = None,
) -> MaskRule:
    r"""Scores weights by sensitivity times uncertainty, and masks the lowest.

    With the sensitivity :math:`I = |\theta \nabla L|` and its mean :math:`J` over a
    window of steps, at the end of a window

    .. math::
        \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) J, \qquad
        \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |J - \bar I|

    and a share of the weights, over all leaves, with the lowest :math:`\bar I \bar U`
    becomes zero, at the first step of a window and at every step from ``final`` on. In
    between they train: use ``pruned(inner, platon(...), hold=False)``.

    Args:
      sparsity: the share of zeros by the step count, such as a cubic.
      window: steps of a window.
      final: the step from which every step masks.
      decays: :math:`\beta_1, \beta_2`.
      where: which leaves, see `cram_jax.prunable`.

    Returns:
      A rule for `cram_jax.pruned` with ``every=1`` and ``hold=False``.

    Example:
      >>> cubic = optax.polynomial_schedule(0.0, 0.8, 3, 500, 100)
      >>> optimizer = cram_jax.pruned(
      ...     optax.adamw(3e-5), platon(cubic, final=600), hold=False
      ... )

    Reference: Zhang et al., PLATON, ICML 2022, algorithm 1, arXiv 2206.12562.
    """
    first, second = decays

    def init(params: Any, key: jax.Array) -> tuple[Any, PlatonState]:
        del key
        masks = optax.tree.ones_like(params, dtype=bool)
        # Three arrays each, as a step may donate its state.
        return masks, PlatonState(
            *(jax.tree.map(jnp.zeros_like, params) for _ in range(3))
        )

    def watch(state: PlatonState, step: Step) -> PlatonState:
        place = (step.count - 1) % window

        def one(
            weights: jax.Array,
            gradient: jax.Array,
            mean: jax.Array,
            sensitivity: jax.Array,
            uncertainty: jax.Array,
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            now = jnp.abs(weights * gradient).astype(mean.dtype)
            average = first * sensitivity + (1 - first) * mean
            spread = second * uncertainty + (1 - second) * jnp.abs(mean - average)
            begins = place == 0  # the last window is over
            return (
                jnp.where(begins, now, (mean * place + now) / (place + 1)),
                jnp.where(begins, average, sensitivity),
                jnp.where(begins, spread, uncertainty),
            )

        structure: Any = jax.tree.structure(step.params)
        columns = [jax.tree.leaves(tree) for tree in (step.params, step.gradients)]
        columns += [jax.tree.leaves(tree) for tree in state]
        rows = [one(*leaves) for leaves in zip(*columns, strict=True)]
        return PlatonState(*map(structure.unflatten, zip(*rows, strict=True)))

    def renew(masks: Any, state: PlatonState, step: Step) -> tuple[Any, PlatonState]:
        count = step.count - 1
        is_due = (count % window == 0) | (count >= final)
        leaves = jax.tree.leaves(masks)
        structure: Any = jax.tree.structure(masks)
        chosen = prunable(step.params, where)
        scores = [
            sensitivity * uncertainty
            for sensitivity, uncertainty, is_chosen in zip(
                jax.tree.leaves(state.sensitivity),
                jax.tree.leaves(state.uncertainty),
                chosen,
                strict=True,
            )
            if is_chosen
        ]
        total = sum(score.size for score in scores)
        share = jnp.where(is_due, sparsity(count), 0.0)
        zeros = jnp.floor(share * total + 1e-3).astype(int)  # float32 shares
        kept = iter(keep_largest(scores, total - zeros))
        return structure.unflatten(
            next(kept) if is_chosen else jnp.ones_like(mask)
            for mask, is_chosen in zip(leaves, chosen, strict=True)
        ), state

    return MaskRule(init, renew, watch)
