"""Statistics of batch normalisation for a compressed model."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cram_jax.training_pass import BatchStats, TrainingPass, Values

# A power of two scales without rounding, and this one is so large that what a batch
# adds to it is lost: m times it shows the momentum with all the digits it has.
_LARGE = 2.0**64

# A counter at which every bias correction 1 - m^count is 1, exact in float32.
_MANY = 2**30

# How well 1 - m must be known, relative to it: as well as bfloat16 resolves.
_RESOLUTION = 2.0**-8


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
    moves a statistic by :math:`s \gets m s + (1 - m) s_\text{batch}`, and the result is
    the mean of :math:`s_\text{batch}`. The momentum :math:`m` is read from the first
    batch, which takes four passes more.

    - Statistics that a pass does not change, as those of a frozen normalisation, keep
      their values, and the others are computed with them.
    - Leaves that are not floating-point keep their values, except counters, which a
      pass increases by exactly 1: a low counter is raised until a bias correction
      :math:`1 - m^\text{count}` rounds to 1, as the averages of Haiku and Equinox need.
    - If running statistics are used to normalise during training, as in Equinox's
      ``mode="ema"``, each batch takes as many passes as there are normalisations in
      sequence, so that each layer sees inputs normalised by that batch's statistics.

    The relative error is that of the model's own arithmetic plus
    :math:`1.2 \times 10^{-7} / (1 - m)`, because the model rounds :math:`m` and
    :math:`1 - m` to float32: 1.2e-5 for 0.99. Statistics narrower than float32 are
    passed to ``apply`` as float32.

    Args:
      apply: ``(batch_stats, batch) -> batch_stats``: one training-mode pass of the
        compressed model. The result must depend on nothing else; jit it, and hand it
        the parameters with `functools.partial` rather than as a captured constant. It
        gets its own copy of the statistics, and may write into it.
      batch_stats: the statistics of the dense model.
      batches: the calibration batches, at least one, each used in turn.

    Returns:
      The new statistics, with the structure, shapes, dtypes and shardings of
      ``batch_stats``.

    Raises:
      TypeError: ``apply`` returns a statistic in a narrower dtype than it was handed,
        or the call is traced, as under `jax.jit`.
      ValueError: there is no batch; ``apply`` moves no statistic, which is what a model
        in evaluation mode does; it returns another structure, a statistic that is not
        finite, or one that does not follow the formula, such as a sum; or the momentum
        is too close to 1 to be read.

    Example:
      >>> def apply(stats, batch):  # Linen: model.apply(..., mutable=["batch_stats"])
      ...     return {"mean": 0.9 * stats["mean"] + 0.1 * batch.mean()}
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([4.0, 8.0])]
      >>> recalibrate(apply, {"mean": jnp.array(-7.0)}, batches)["mean"].round(3)
      Array(4., dtype=float32)

    Reference: Peste et al., CrAM, ICLR 2023 (statistics correction), arXiv 2207.14200.
    """
    training_pass = TrainingPass(apply, batch_stats)
    momentum: _Momentum | None = None
    total: Values = {}
    count = 0
    steps = 0
    for count, batch in enumerate(batches, start=1):
        where = f"calibration batch {count - 1}"
        if momentum is None:
            momentum = _read_momentum(training_pass, batch)
        if steps == 1:
            values, _ = _step(training_pass, momentum, momentum.start, batch, where)
        else:
            values, steps = _settle(training_pass, momentum, batch, where)
        total = {i: values[i] + total.get(i, 0) for i in momentum.moves}
    if momentum is None:
        raise ValueError("batches must hold at least one calibration batch, got none")
    return training_pass.replace(
        {
            i: np.where(moves, total[i] / count, training_pass.old[i])
            for i, moves in momentum.moves.items()
        }
        | momentum.counters
    )


class _Momentum(NamedTuple):
    """What the first batch tells about every floating leaf.

    Attributes:
      start: values to read the statistics of a batch from: 0 where they move, so that
        nothing cancels, the old ones where they do not; and counters, raised.
      moves: bool, which entries move.
      weight: 1 - m; 1 for entries that do not move.
      counters: their new values, where they have to be raised.
    """

    start: Values
    moves: Values
    weight: Values
    counters: Values


def _read_momentum(training_pass: TrainingPass, batch: Any) -> _Momentum:
    old = training_pass.old
    floating = training_pass.floating
    plain = training_pass({}, batch)
    with np.errstate(over="ignore"):
        by_one = [i for i in old if old[i].size and (plain[i] == old[i] + 1).all()]
    counters = [i for i in by_one if i in training_pass.integer]
    raised = {i: _raised(old[i], _MANY) for i in counters}

    large = {i: np.full(old[i].shape, _LARGE) for i in floating}
    from_large = training_pass(large | raised, batch)
    moves = {i: from_large[i] != _LARGE for i in floating}
    for i in floating:
        same = (plain[i] == old[i]) | (np.isnan(plain[i]) & np.isnan(old[i]))
        if (~moves[i] & ~same).any():
            if i not in by_one or moves[i].any():
                raise ValueError(
                    f"apply must average {training_pass.name(i)} with a fixed momentum,"
                    f" but adds to it and forgets nothing: a sum, or an average of all "
                    f"batches so far"
                )
            counters.append(i)
            raised[i] = _raised(old[i], _MANY)
    if floating and not any(moving.any() for moving in moves.values()):
        names = ", ".join(training_pass.name(i) for i in floating[:3])
        raise ValueError(
            f"apply must update {names}{', ...' * (len(floating) > 3)} by a "
            f"training-mode pass, but left everything unchanged, as a model in "
            f"evaluation mode does"
        )

    start = {i: np.where(moves[i], 0, old[i]) for i in floating} | raised
    from_zero = training_pass(start, batch)
    weight = {}
    passes = 1
    for i in floating:
        kept = np.where(moves[i], (from_large[i] - from_zero[i]) / _LARGE, 0)
        _check_momentum(training_pass.name(i), kept, training_pass.resolution(i))
        weight[i] = 1 - kept
        highest = kept.max(initial=0)
        if highest > 0:
            decades = math.log(training_pass.resolution(i)) / math.log(highest)
            passes = max(passes, math.ceil(decades))
    news = {i: _raised(old[i], passes) for i in counters}
    return _Momentum(
        start,
        moves,
        weight,
        {i: new for i, new in news.items() if (new != old[i]).any()},
    )


def _raised(counter: np.ndarray[Any, Any], least: int) -> np.ndarray[Any, Any]:
    """The counter, at least this high if its dtype goes so far."""
    if jnp.issubdtype(counter.dtype, jnp.integer):
        least = min(least, int(jnp.iinfo(counter.dtype).max) - 1)
    return np.maximum(counter, np.asarray(least, counter.dtype))


def _check_momentum(name: str, kept: np.ndarray[Any, Any], resolution: float) -> None:
    if not np.isfinite(kept).all():
        raise ValueError(
            f"apply must return a finite {name}, whatever the statistics that it is "
            f"handed; from {_LARGE:g} or from 0 it did not"
        )
    limit = 1 - resolution / _RESOLUTION
    if kept.max(initial=0) > limit:
        raise ValueError(
            f"apply must keep at most {limit:.6g} of the old {name} in a pass, or its "
            f"digits do not tell what a batch contributes, got {kept.max():.9g}"
        )


def _settle(
    training_pass: TrainingPass, momentum: _Momentum, batch: Any, where: str
) -> tuple[Values, int]:
    """The statistics that a pass over the batch leaves unchanged, and the steps.

    One step is enough if the statistics of a batch do not depend on those handed in. If
    each normalisation depends on those before it, every step settles one more.
    """
    values = momentum.start
    largest = dict.fromkeys(momentum.moves, 0.0)
    limit = len(momentum.moves) + 1
    for step in range(limit + 1):
        new, change = _step(training_pass, momentum, values, batch, where)
        if step and all(
            # The rounding of both products, of their sum and of the momentum; or what
            # is left of a mean that has become 0, of which only rounding remains.
            _size(change[i]) <= 16 * training_pass.resolution(i) * _size(new[i])
            or _size(change[i] / momentum.weight[i]) <= 2.0**-22 * largest[i]
            for i in change
        ):
            return new, step
        previous, values = values, new
        largest = {i: max(largest[i], _size(new[i])) for i in largest}
    for i, moved_by in change.items():
        error = _size(moved_by / momentum.weight[i])
        if error > max(_RESOLUTION * _size(values[i]), 2.0**-16 * largest[i]):
            again = _step(training_pass, momentum, previous, batch, where)[1]
            if all((again[i] == change[i]).all() for i in change):
                reason = f"it did not settle in {limit} passes"
            else:
                reason = (
                    "two passes from the same statistics differed: the result must "
                    "depend on nothing else, such as a dropout key that advances"
                )
            raise ValueError(
                f"apply must move {training_pass.name(i)} towards a statistic of the "
                f"batch, by s = m s + (1 - m) s_batch, but in {where} {reason}"
            )
    return values, limit


def _step(
    training_pass: TrainingPass,
    momentum: _Momentum,
    values: Values,
    batch: Any,
    where: str,
) -> tuple[Values, Values]:
    """Solves ``moved = values + weight (batch's - values)`` for the batch's.

    Returns:
      The values with those that move replaced, and by how much they moved.
    """
    moved = training_pass(values, batch)
    change, new = {}, {}
    for i, moves in momentum.moves.items():
        handed = training_pass.rounded(i, values[i])
        change[i] = np.where(moves, moved[i] - handed, 0)
        new[i] = np.where(moves, handed + change[i] / momentum.weight[i], values[i])
        if not np.isfinite(new[i][moves]).all():
            raise ValueError(
                f"apply must return a finite {training_pass.name(i)}, but that of "
                f"{where} is not"
            )
    return values | new, change


def _size(array: np.ndarray[Any, Any]) -> float:
    return float(np.abs(array).max(initial=0))
