"""Compression-aware training by stochastic Frank-Wolfe: no projection, sparse steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cram_jax import Where, keep_largest, prunable
from cram_jax.projector import safe_denominator


class FrankWolfeState(NamedTuple):
    """State of `frank_wolfe`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      momentum: like the parameters.
      radii: the radius of the ball of each parameter.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, over tuple.count
    momentum: Any
    radii: Any


def frank_wolfe(
    learning_rate: float | optax.Schedule,
    *,
    density: float,
    radius: float = 10.0,
    momentum: float = 0.9,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Moves towards a vertex of a k-support-norm ball, which has k entries.

    .. math::
        m \leftarrow \mu m + g, \qquad
        v = -\tau \, \mathrm{top}_k(m) / \|\mathrm{top}_k(m)\|_2, \qquad
        \theta \leftarrow \theta + \gamma (v - \theta), \qquad
        \gamma = \min(1, \eta \|m\| / \|\theta - v\|)

    for each leaf. It replaces SGD, without weight decay, because the ball bounds the
    weights. Its results are below CrAM and gradual pruning in CrAM's own table.

    Args:
      learning_rate: :math:`\eta`, or a schedule.
      density: the share k / n of the prunable leaves; that of the others is 1.
      radius: :math:`\tau` in norms of the initial parameters of the leaf.
      momentum: :math:`\mu`, without dampening.
      where: which leaves, see `cram_jax.prunable`.

    Returns:
      A gradient transformation with the state `FrankWolfeState`.

    Example:
      >>> optimizer = frank_wolfe(0.1, density=0.3, radius=15.0)

    References: Zimmer et al., Compression-aware training of neural networks using
      Frank-Wolfe, 2022, arXiv 2205.11921; Miao et al., ICLR 2022.
    """

    def init(params: Any) -> FrankWolfeState:
        # A leaf that begins at zero, such as a bias, has the ball of one of norm 1.
        def size(leaf: jax.Array) -> jax.Array:
            return radius * safe_denominator(jnp.linalg.norm(leaf))

        return FrankWolfeState(
            jnp.zeros([], jnp.int32),
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(size, params),
        )

    def update(
        updates: Any, state: FrankWolfeState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, FrankWolfeState]:
        del extra_args
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        moments = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)

        def move(
            leaf: jax.Array, moment: jax.Array, tau: jax.Array, is_chosen: bool
        ) -> jax.Array:
            count = max(round(density * leaf.size), 1) if is_chosen else leaf.size
            (mask,) = keep_largest([moment], count)
            top = jnp.where(mask, moment, 0)
            away = -tau * top / safe_denominator(jnp.linalg.norm(top)) - leaf
            factor = jnp.linalg.norm(moment) / safe_denominator(jnp.linalg.norm(away))
            return jnp.minimum(rate * factor, 1) * away

        structure: Any = jax.tree.structure(params)
        columns = map(jax.tree.leaves, (params, moments, state.radii))
        moves = [
            move(leaf, moment, tau, is_chosen).astype(leaf.dtype)
            for leaf, moment, tau, is_chosen in zip(
                *columns, prunable(params, where), strict=True
            )
        ]
        count = optax.safe_increment(state.count)
        return structure.unflatten(moves), FrankWolfeState(count, moments, state.radii)

    return optax.GradientTransformationExtraArgs(init, update)
