"""Magnitude pruning during training: gradual, and alternating with dense phases."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cram_jax import Projector, pruned, renew_by


def gradual(
    inner: optax.GradientTransformation,
    make: Callable[[Any], Projector],
    sparsity: float,
    *,
    begin: int,
    end: int,
    every: int,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradual magnitude pruning along a cubic.

    .. math:: s(t) = s_f - s_f (1 - (t - t_0) / (t_1 - t_0))^3

    The baseline of every paper. Pruned weights get no gradient and stay pruned.

    Args:
      inner: the optimiser.
      make: from a share of zeros to a projector, such as `cram_jax.top_k`.
      sparsity: :math:`s_f`.
      begin: :math:`t_0`, in steps.
      end: :math:`t_1`.
      every: steps between prunings.

    Example:
      >>> optimizer = gradual(
      ...     optax.sgd(0.1), cram_jax.top_k, 0.9, begin=0, end=750, every=20
      ... )

    Reference: Zhu and Gupta, To prune, or not to prune, 2017, arXiv 1710.01878.
    """
    cubic = optax.polynomial_schedule(0.0, sparsity, 3, max(end - begin, 1), begin)
    return pruned(inner, renew_by(make, cubic), every=every, restart=None)


def ac_dc(
    inner: optax.GradientTransformation,
    make: Callable[[Any], Projector],
    sparsity: float,
    *,
    begin: int,
    end: int,
    phase: int,
) -> optax.GradientTransformationExtraArgs:
    """AC/DC: compressed and decompressed phases in turn.

    Dense until ``begin``; then compressed and dense phases in turn, the last dense one
    twice as long (three times, if an even number of phases lies between ``begin`` and
    ``end``); compressed from ``end`` on. A compressed phase keeps the masks of its
    first step. Weights come back as zeros, and all of the momentum restarts.

    Args:
      inner: the optimiser.
      make: from a share of zeros to a projector.
      sparsity: of the compressed phases.
      begin: steps before the first compressed phase.
      end: first step of the last compressed phase.
      phase: steps of a phase; it should divide ``begin`` and ``end``.

    Example:
      ResNet-50 on ImageNet, 100 epochs (their configuration, in epochs):

      >>> optimizer = ac_dc(
      ...     optax.sgd(0.256, momentum=0.875),
      ...     cram_jax.top_k,
      ...     0.9,
      ...     begin=10,
      ...     end=85,
      ...     phase=5,
      ... )

    Reference: Peste et al., AC/DC, NeurIPS 2021, algorithm 1, arXiv 2106.12379.
    """

    def wave(count: Any) -> jax.Array:
        alternates = (count >= begin) & (count < end - 2 * phase)
        is_compressed = alternates & ((count - begin) // phase % 2 == 0)
        return jnp.where((count >= end) | is_compressed, sparsity, 0.0)

    return pruned(inner, renew_by(make, wave), every=phase, restart="all")
