"""How much of each layer to prune: SPDY."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cram_jax.validation import check_integer

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Levels: TypeAlias = np.ndarray[Any, np.dtype[np.intp]]
"""For each layer, the number of its level."""


def allocate(costs: Any, times: Any, budget: float, *, buckets: int = 10_000) -> Levels:
    r"""Chooses a level of compression for each layer: the least cost within a budget.

    .. math:: \min_{s} \sum_l c_{l, s_l} \quad \text{such that} \quad
              \sum_l t_{l, s_l} \le B

    by dynamic programming. Time is counted in ``buckets`` equal parts of the budget and
    rounded up for each level, so the budget always holds; a choice within one part per
    layer of the budget may be missed. "Time" is anything that adds up: seconds,
    multiply-adds, bytes.

    Args:
      costs: (layers, levels), what each level costs in accuracy, at least 0.
      times: (layers, levels), what each level takes of the budget, at least 0.
      budget: above 0.
      buckets: parts of the budget.

    Returns:
      The level of each layer, shape (layers,).

    Raises:
      ValueError: the shapes differ, a number is negative or not finite, ``buckets`` is
        below 1, or the fastest levels of all layers together exceed the budget.
      TypeError: ``buckets`` is not an integer.

    Example:
      Either layer can be the fast one, and the second costs less:

      >>> from cram_jax.layerwise import allocate
      >>> allocate([[0, 5], [0, 1]], times=[[4, 1], [4, 1]], budget=5)
      array([0, 1])

    Reference: Frantar and Alistarh, SPDY, ICML 2022, arXiv 2201.13096.
    """
    prices, knapsack = _problem(costs, times, budget, buckets)
    return knapsack.solve(prices)


def search(
    score: Callable[[Levels], float],
    costs: Any,
    times: Any,
    budget: float,
    *,
    seed: int = 0,
    starts: int = 100,
    failures: int = 100,
    buckets: int = 10_000,
) -> Levels:
    """Finds how sensitive each layer is, by trying what `allocate` then chooses.

    Each layer's costs are multiplied by a coefficient between 0 and 1. The best of some
    random coefficients, by the score of the levels that they lead to, is improved: a
    few of them (a tenth of the layers at first, one in the end) are redrawn, and kept
    if the score falls, until ``failures`` draws in a row have failed. No levels are
    scored twice.

    Args:
      score: from levels to a number, such as the loss of the network compressed to
        them; less is better.
      costs: (layers, levels), such as ``(i / (levels - 1)) ** 2`` for the i-th level in
        every layer, as in the paper.
      times: see `allocate`.
      budget: see `allocate`.
      seed: of the draws.
      starts: how many sets of random coefficients to start with.
      failures: draws in a row without a gain.
      buckets: see `allocate`.

    Returns:
      The best levels found, shape (layers,).

    Raises:
      ValueError: see `allocate`; or ``starts`` is below 1, ``failures`` is negative, or
        a score is NaN.
      TypeError: ``starts``, ``failures`` or ``buckets`` is not an integer.

    Example:
      The first layer turns out to be the one that matters:

      >>> from cram_jax.layerwise import search
      >>> times = [[4, 1], [4, 1]]
      >>> search(lambda levels: 10 * levels[0] + levels[1], [[0, 1]] * 2, times, 5)
      array([0, 1])

    Reference: Frantar and Alistarh, SPDY, ICML 2022, arXiv 2201.13096.
    """
    prices, knapsack = _problem(costs, times, budget, buckets)
    check_integer("starts", starts, 1)
    check_integer("failures", failures, 0)
    generator = np.random.default_rng(seed)
    scores: dict[bytes, float] = {}

    def attempt(coefficients: Numbers) -> _Attempt:
        levels = knapsack.solve(prices * coefficients[:, None])
        name = levels.tobytes()
        if name not in scores:
            scores[name] = float(score(levels))
            if np.isnan(scores[name]):
                raise ValueError(f"score must be a number, got NaN for {levels}")
        return _Attempt(scores[name], coefficients, levels)

    layers = len(prices)
    attempts = (attempt(generator.uniform(size=layers)) for _ in range(starts))
    best = min(attempts, key=lambda each: each.score)
    for count in range(max(round(0.1 * layers), 1), 0, -1):
        failed = 0
        while failed < failures:
            changed = best.coefficients.copy()
            chosen = generator.choice(layers, count, replace=False)
            changed[chosen] = generator.uniform(size=count)
            challenger = attempt(changed)
            failed = 0 if challenger.score < best.score else failed + 1
            best = challenger if challenger.score < best.score else best
    return best.levels


class _Attempt(NamedTuple):
    score: float
    coefficients: Numbers
    levels: Levels


class _Knapsack:
    """Chooses levels for one budget.

    Args:
      times: (layers, levels).
      budget: above 0.
      buckets: parts of it.
    """

    def __init__(self, times: Numbers, budget: float, buckets: int) -> None:
        self.times, self.budget = times, budget
        # A rounding error must not cost a part if a time is a whole number of parts.
        parts = np.ceil(np.minimum(times / budget, 2) * buckets * (1 - 1e-12))
        self.parts = parts.astype(np.intp)
        self.buckets = buckets

    def solve(self, costs: Numbers) -> Levels:
        """The levels of the least cost."""
        best = np.zeros(self.buckets + 1)
        choices = []
        for own, parts in zip(costs, self.parts, strict=True):
            totals = np.full((len(own), self.buckets + 1), np.inf)
            for level, (cost, part) in enumerate(zip(own, parts, strict=True)):
                if part <= self.buckets:
                    totals[level, part:] = best[: self.buckets + 1 - part] + cost
            choices.append(totals.argmin(axis=0))
            best = totals.min(axis=0)
        if not np.isfinite(best[-1]):
            return np.asarray(self.times.argmin(axis=1))
        left = self.buckets
        levels: list[int] = []
        for parts, choice in zip(self.parts[::-1], choices[::-1], strict=True):
            levels.insert(0, int(choice[left]))
            left -= parts[levels[0]]
        return np.asarray(levels, np.intp)


def _problem(
    costs: Any, times: Any, budget: float, buckets: int
) -> tuple[Numbers, _Knapsack]:
    """The checked costs, and the function that chooses levels."""
    prices, spent = _table("costs", costs), _table("times", times)
    if prices.shape != spent.shape:
        raise ValueError(
            f"costs and times must have one shape, got {prices.shape} and {spent.shape}"
        )
    check_integer("buckets", buckets, 1)
    fastest = float(spent.min(axis=1).sum())
    # A sum of the fastest times may be rounded differently.
    if not 0 < budget < np.inf or fastest * (1 - 1e-12) > budget:
        raise ValueError(
            f"budget must be above 0 and at least {fastest:g}, what the fastest levels "
            f"take, got {budget!r}"
        )
    return prices, _Knapsack(spent, budget, buckets)


def _table(name: str, values: Any) -> Numbers:
    table: Numbers = np.asarray(values, np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"{name} must be (layers, levels), got the shape {table.shape}"
        )
    if not (np.isfinite(table) & (table >= 0)).all():
        raise ValueError(f"{name} must be finite and at least 0, got {table.tolist()}")
    return table
