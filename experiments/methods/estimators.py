"""The gradient at the pruned weights, with one evaluation: straight-through methods.

They train dense weights and are evaluated pruned. If there is batch norm, recalibrate:
the statistics that the training loop keeps are those of the dense pass.
"""

from collections.abc import Callable
from typing import Any

import optax

from cram_jax import Projector, cached, cram, pulled, scheduled


def straight_through_estimator(
    loss_fn: Callable[..., Any], projector: Projector, **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Top-K straight-through, and quantisation-aware training: :math:`∇L(C(θ))`.

    Args:
      loss_fn: as for `cram_jax.cram`.
      projector: :math:`C`.
      **options: of `cram_jax.cram`.

    Example:
      >>> rule = straight_through_estimator(lambda params: 0.0, cram_jax.top_k(0.9))

    Reference: Bengio et al., 2013, arXiv 1308.3432.
    """
    return cram(loss_fn, projector, 0.0, sparse_gradients=False, **options)


def dpf(
    loss_fn: Callable[..., Any],
    make: Callable[[Any], Projector],
    sparsity: float,
    *,
    begin: int,
    end: int,
    every: int = 16,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Dynamic model pruning with feedback.

    .. math:: u = \nabla L(M_t \odot \theta)

    for the whole of :math:`\theta`; masks are renewed every 16 steps, and their
    sparsity grows along a cubic.

    Args:
      loss_fn: as for `cram_jax.cram`.
      make: from a share of zeros to a projector.
      sparsity: the last one.
      begin: steps without zeros.
      end: steps after which the sparsity stays.
      every: steps between renewals.
      **options: of `cram_jax.cram`.

    Example:
      >>> rule = dpf(lambda params: 0.0, cram_jax.top_k, 0.9, begin=0, end=750)

    Reference: Lin et al., Dynamic model pruning with feedback, ICLR 2020, algorithm 1,
      arXiv 2006.07253.
    """
    # `scheduled` counts renewals.
    length, delay = max((end - begin) // every, 1), begin // every
    cubic = optax.polynomial_schedule(0.0, sparsity, 3, length, delay)
    masks = cached(scheduled(make, cubic), every=every)
    return straight_through_estimator(loss_fn, masks, **options)


def sr_ste(
    loss_fn: Callable[..., Any], projector: Projector, decay: float, **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Straight-through with a decay of the pruned weights, made for n of m.

    .. math:: u = \nabla L(M \odot \theta) + \lambda (1 - M) \odot \theta

    Args:
      loss_fn: as for `cram_jax.cram`.
      projector: such as ``n_m(2, 4)``.
      decay: :math:`\lambda`; 2e-4 in the paper.
      **options: of `cram_jax.cram`.

    Example:
      >>> rule = sr_ste(lambda params: 0.0, cram_jax.n_m(2, 4), 2e-4)

    Reference: Zhou et al., Learning N:M fine-grained structured sparse neural networks
      from scratch, ICLR 2021, equation 6, arXiv 2102.04010.
    """
    return optax.chain(
        straight_through_estimator(loss_fn, projector, **options),
        pulled(projector, decay),
    )
