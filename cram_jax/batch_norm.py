"""Statistics of batch normalisation for a compressed model."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

BatchStats: TypeAlias = Any
"""A pytree of running statistics: a Linen collection, an NNX State of BatchStat."""


def recalibrate(
    apply: Callable[[BatchStats, Any], BatchStats],
    batch_stats: BatchStats,
    batches: Iterable[Any],
) -> BatchStats:
    r"""Replaces running statistics by their average over calibration batches.

    Compression changes the distribution that each normalisation sees, so the statistics
    of the dense model no longer fit: without recalibration a heavily pruned network
    with batch normalisation is near chance. A few batches of training data are enough,
    augmented as in training: plain images have other statistics.

    The old statistics are forgotten, and every batch counts alike. A training pass
    moves a statistic by :math:`s \gets m s + (1 - m) s_\text{batch}`; the momentum
    :math:`m` is read off two passes over the first batch, so any value does, and the
    model stays as it is.

    Args:
      apply: ``(batch_stats, batch) -> batch_stats``: one training-mode pass of the
        compressed model. Pure; jit it, and hand it the parameters with
        `functools.partial` rather than as a captured constant.
      batch_stats: the statistics of the dense model, for their structure; leaves that
        are not of a floating dtype keep their values.
      batches: the calibration batches, at least one.

    Returns:
      The new statistics, like ``batch_stats``.

    Raises:
      ValueError: there is no batch; or ``apply`` does not move a statistic, which is
        what a model in evaluation mode does.

    Example:
      >>> def apply(stats, batch):  # Linen: model.apply(..., mutable=["batch_stats"])
      ...     return {"mean": 0.9 * stats["mean"] + 0.1 * batch.mean()}
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([4.0, 8.0])]
      >>> recalibrate(apply, {"mean": jnp.array(-7.0)}, batches)["mean"].round(3)
      Array(4., dtype=float32)

    Reference: Peste et al., CrAM, ICLR 2023 (statistics correction), arXiv 2207.14200.
    """
    zeros, ones = (_filled(batch_stats, value) for value in (0, 1))
    share = total = None
    count = 0
    for batch in batches:
        moved = apply(zeros, batch)
        if share is None:
            # The statistics move affinely: from 1 they land m above where 0 lands.
            share = jax.tree.map(
                lambda one, zero: 1 - (one - zero), apply(ones, batch), moved
            )
            _check_moves(share)
        total = moved if total is None else jax.tree.map(jnp.add, total, moved)
        count += 1
    if count == 0:
        raise ValueError("batches must hold at least one calibration batch, got none")
    return jax.tree.map(
        lambda old, new, part: (
            (new / (count * part)).astype(old.dtype) if _is_statistic(old) else old
        ),
        batch_stats,
        total,
        share,
    )


def _is_statistic(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _filled(batch_stats: BatchStats, value: int) -> BatchStats:
    return jax.tree.map(
        lambda leaf: jnp.full_like(leaf, value) if _is_statistic(leaf) else leaf,
        batch_stats,
    )


def _check_moves(share: BatchStats) -> None:
    for path, part in jax.tree.leaves_with_path(share):
        if _is_statistic(part) and not (part > 0).all():
            raise ValueError(
                f"apply must update batch_stats{jax.tree_util.keystr(path)} by a "
                f"training-mode pass, but left it as it was"
            )
