"""Constrained training by the method of multipliers: ADMM, SAFE, ELSA."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cram_jax import Projector, pulled, sam


def rising(strength: float, steps: int) -> optax.Schedule:
    """From 0 to a strength along half a cosine, as SAFE's penalty."""

    def schedule(count: Any) -> jax.Array:
        progress = jnp.minimum(count / steps, 1)
        return strength * 0.5 * (1 - jnp.cos(jnp.pi * progress))

    return schedule


def admm(
    projector: Projector, strength: float, steps: int, *, every: int = 32
) -> optax.GradientTransformationExtraArgs:
    r"""The alternating direction method of multipliers.

    .. math::
        u = \nabla L(\theta) + \lambda_t (\theta - z + v), \qquad
        z \leftarrow C(\theta + v), \quad v \leftarrow v + \theta - z
        \quad \text{every 32 steps}

    At the end compress with the same projector.

    Args:
      projector: :math:`C`.
      strength: the last :math:`\lambda`.
      steps: of the whole run.
      every: steps between renewals.

    Example:
      >>> optimizer = optax.chain(
      ...     admm(cram_jax.top_k(0.9), 1e-3, 1000), optax.sgd(0.1)
      ... )

    Reference: Zhang et al., A systematic DNN weight pruning framework, ECCV 2018,
      arXiv 1804.03294.
    """
    return pulled(projector, rising(strength, steps), every=every, dual=True)


def elsa(
    projector: Projector, strength: float, *, every: int = 32, decay: float = 0.999
) -> optax.GradientTransformationExtraArgs:
    r"""ELSA: `admm` whose projection asks what a weight is worth to the loss.

    .. math:: z \leftarrow C_s(\theta + v)

    keeps the entries with the largest :math:`s (\theta + v)^2`, where :math:`s` is the
    second moment of Adam, which comes next. The strength is constant.

    Args:
      projector: :math:`C`; the authors prune every layer to the same share.
      strength: :math:`\lambda`; 0.01 in the authors' code.
      every: steps between renewals.
      decay: of the second moment, that of Adam.

    Example:
      >>> optimizer = optax.chain(
      ...     elsa(cram_jax.top_k(0.9, scope="layer"), 0.01), optax.adam(2e-4)
      ... )

    Reference: Lee et al., ELSA, ICLR 2026, arXiv 2510.01650.
    """
    return pulled(projector, strength, every=every, dual=True, importance=decay)


def safe(
    loss_fn: Callable[..., Any],
    projector: Projector,
    strength: float,
    steps: int,
    *,
    rho: float = 0.1,
    every: int = 32,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""SAFE: `admm` with the gradient of sharpness-aware minimisation.

    Args:
      loss_fn: as for `cram_jax.sam`.
      projector: :math:`C`.
      strength: the last :math:`\lambda`; 1e-3 for ResNet-20 in the authors' code.
      steps: of the whole run.
      rho: radius of the ascent.
      every: steps between renewals.
      has_aux: whether the loss returns auxiliary data.

    Example:
      >>> rule = safe(lambda params: 0.0, cram_jax.top_k(0.95), 1e-3, 1000)

    Reference: Lee et al., SAFE: Finding sparse and flat minima, ICML 2025, algorithm 1,
      arXiv 2506.06866.
    """
    return optax.chain(
        sam(loss_fn, rho, has_aux=has_aux),
        admm(projector, strength, steps, every=every),
    )
