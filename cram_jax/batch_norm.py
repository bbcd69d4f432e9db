"""Statistics of batch normalisation for a compressed model."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from cram_jax.training_pass import BatchStats, TrainingPass, Values
from cram_jax.validation import check_batches, check_function

# A power of two scales without rounding, and this one is so large that what a batch
# adds to it is lost: m times it shows every digit of the momentum.
_LARGE = 2.0**64

# A counter at which every bias correction 1 - m^count is 1, exact in float32.
_MANY = 2**30

# The relative precision to which 1 - m must be known: that of bfloat16.
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
    augmented as in training: plain images have different statistics.

    The old statistics are forgotten, and every batch counts alike. A training pass
    moves a statistic by :math:`s \gets m s + (1 - m) s_\text{batch}`, and the result is
    the mean of :math:`s_\text{batch}`. The momentum :math:`m` is read from the first
    batch, which takes six more passes.

    - Statistics that a pass does not change, such as those of a frozen normalisation,
      keep their values, and the others are computed with them.
    - Leaves that are not floating-point keep their values, except counters, which a
      pass increases by exactly 1: a low counter is raised until a bias correction
      :math:`1 - m^\text{count}` rounds to 1, as the averages of Haiku and Equinox need.
    - If running statistics are used to normalise during training, as in Equinox's
      ``mode="ema"``, each batch takes a pass more than there are normalisations in
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
      TypeError: ``apply`` is not a function, or returns a statistic in a narrower dtype
        than it was given; ``batches`` is a single batch; or the call is traced, as
        under `jax.jit`.
      ValueError: there is no batch; ``apply`` moves no statistic, which is what a model
        in evaluation mode does; it returns a different structure, a statistic that is
        not finite, or one that does not follow the formula, such as a sum; or the
        momentum is too close to 1 to be read.

    Example:
      >>> def apply(stats, batch):  # Linen: model.apply(..., mutable=["batch_stats"])
      ...     return {"mean": 0.9 * stats["mean"] + 0.1 * batch.mean()}
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([4.0, 8.0])]
      >>> recalibrate(apply, {"mean": jnp.array(-7.0)}, batches)["mean"].round(3)
      Array(4., dtype=float32)

    Reference: Peste et al., CrAM, ICLR 2023 (statistics correction), arXiv 2207.14200.
    """
    check_function("apply", apply)
    check_batches("batches", batches)
    training_pass = TrainingPass(apply, batch_stats)
    momentum: _Momentum | None = None
    total: Values = {}
    count = 0
    separate = True
    for count, batch in enumerate(batches, start=1):
        step = partial(_step, training_pass, batch, f"calibration batch {count - 1}")
        if momentum is None:
            momentum = _read_momentum(training_pass, batch)
            separate = _is_separate(training_pass, momentum, step)
        if separate:
            values, _ = step(momentum, momentum.zero)
        else:
            values = _settle(training_pass, momentum, step)
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
    """What the first batch reveals about every floating leaf.

    Attributes:
      zero: values to start a pass from: 0 where they move, so that nothing cancels, the
        old ones where they do not; and counters, raised.
      old: the same with the old values.
      moves: bool, which entries move.
      weight: 1 - m; 1 for entries that do not move.
      counters: their new values, where they have to be raised.
    """

    zero: Values
    old: Values
    moves: Values
    weight: Values
    counters: Values


_Step: TypeAlias = Callable[[_Momentum, Values], tuple[Values, Values]]
"""See `_step`, for one batch."""


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

    zero = {i: np.where(moves[i], 0, old[i]) for i in floating} | raised
    from_zero = training_pass(zero, batch)
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
    finite = {i: np.where(moves[i] & ~np.isfinite(old[i]), 0, old[i]) for i in floating}
    return _Momentum(
        zero,
        finite | raised,
        moves,
        weight,
        {i: new for i, new in news.items() if (new != old[i]).any()},
    )


def _raised(counter: np.ndarray[Any, Any], least: int) -> np.ndarray[Any, Any]:
    """The counter, at least this high if its dtype allows."""
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


def _is_separate(training_pass: TrainingPass, momentum: _Momentum, step: _Step) -> bool:
    """Whether the statistics of a batch are independent of those passed in.

    Then passes from 0, from 1 and from the result agree up to the rounding of products,
    sums and the momentum. A bias-corrected average moves with the sum that it corrects,
    so all start alike.
    """
    found, _ = step(momentum, momentum.zero)
    ones = {
        i: np.where(moves, 1, momentum.zero[i]) for i, moves in momentum.moves.items()
    }
    from_one, _ = step(momentum, momentum.zero | ones)
    _, change = step(momentum, found)
    for i, weight in momentum.weight.items():
        rounding = 16 * training_pass.resolution(i)
        largest = _size(ones[i]) + _size(found[i])
        if _size((from_one[i] - found[i]) * weight) > rounding * largest:
            return False
        if _size(change[i]) > rounding * _size(found[i]):
            return False
    return True


def _settle(training_pass: TrainingPass, momentum: _Momentum, step: _Step) -> Values:
    """The statistics that a pass over a batch leaves unchanged.

    If each normalisation depends on those before it, every step fixes one more.
    """
    values = momentum.old
    largest = {i: _size(values[i]) for i in momentum.moves}
    limit = len(momentum.moves) + 2
    for _ in range(limit):
        previous = values
        values, change = step(momentum, previous)
        error = {i: _size(change[i] / momentum.weight[i]) for i in change}
        largest = {i: max(largest[i], _size(values[i])) for i in largest}
        if all(
            # Rounding; the second term for a mean that has become 0, relative to what
            # it was.
            _size(change[i]) <= 16 * training_pass.resolution(i) * _size(values[i])
            or error[i] <= 2.0**-22 * largest[i]
            for i in change
        ):
            return values
    for i in change:
        if error[i] > max(_RESOLUTION * _size(values[i]), 2.0**-16 * largest[i]):
            again = step(momentum, previous)[1]
            if all((again[j] == change[j]).all() for j in change):
                reason = f"they did not settle in {limit} passes over one batch"
            else:
                reason = (
                    "two passes from the same statistics differed: the result must "
                    "depend on nothing else, such as a dropout key that advances"
                )
            raise ValueError(
                f"apply must move {training_pass.name(i)} towards a statistic of the "
                f"batch, by s = m s + (1 - m) s_batch, but {reason}"
            )
    return values


def _step(
    training_pass: TrainingPass,
    batch: Any,
    where: str,
    momentum: _Momentum,
    values: Values,
) -> tuple[Values, Values]:
    """Solves ``moved = values + weight (batch's - values)`` for the batch's statistics.

    Returns:
      The values, those that move replaced, and by how much they moved.
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
