"""The levels of least cost, beside all levels there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cram_jax.layerwise import allocate, search


def cheapest(costs, times, budget):
    """The least cost of all levels within the budget, tried one by one."""
    layers = range(len(costs))
    return min(
        sum(costs[i][level] for i, level in enumerate(levels))
        for levels in itertools.product(range(costs.shape[1]), repeat=len(costs))
        if sum(times[i][levels[i]] for i in layers) <= budget
    )


@st.composite
def problems(draw):
    """Whole times, so that a bucket for each unit rounds nothing."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    costs = draw(hnp.arrays(float, shape, elements=st.integers(0, 20)))
    times = draw(hnp.arrays(float, shape, elements=st.integers(0, 12)))
    fastest = int(times.min(axis=1).sum())
    budget = draw(st.integers(max(fastest, 1), fastest + 20))
    return costs, times, budget


@given(problems())
def test_allocation_is_the_best_of_all_levels(problem):
    costs, times, budget = problem
    levels = allocate(costs, times, budget, buckets=3 * budget)
    rows = np.arange(len(costs))
    assert times[rows, levels].sum() <= budget
    assert costs[rows, levels].sum() == cheapest(costs, times, budget)


@given(problems(), st.integers(1, 7))
def test_the_budget_holds_however_coarse_the_buckets(problem, buckets):
    costs, times, budget = problem
    levels = allocate(costs, times, budget, buckets=buckets)
    assert times[np.arange(len(costs)), levels].sum() <= budget


def test_a_fine_grid_finds_the_best_of_real_times():
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs, times = rng.uniform(size=(2, 4, 4))
        budget = times.mean(axis=1).sum()
        levels = allocate(costs, times, budget)
        # 10,000 buckets round four times up by less than 4e-4 of the budget.
        best = cheapest(costs, times * (1 + 4e-4), budget)
        assert cheapest(costs, times, budget) <= costs[range(4), levels].sum() <= best


def test_the_fastest_levels_fit_a_budget_of_their_sum():
    # Added up in float64, three tenths are more than 0.3.
    assert allocate([[0, 1]] * 3, [[1, 0.1]] * 3, 0.3).tolist() == [1, 1, 1]


def test_the_search_finds_which_layers_matter():
    """Ten layers of equal times, of which the score heeds three."""
    rng = np.random.default_rng(1)
    weights = np.zeros(10)
    weights[[1, 4, 7]] = 1 + rng.uniform(size=3)
    depth = np.linspace(0, 1, 6) ** 2
    costs = np.tile(depth, (10, 1))
    times = np.tile(np.linspace(1, 0, 6), (10, 1))
    scored = []

    def score(levels):
        scored.append(tuple(levels))
        return float(weights @ depth[levels])

    levels = search(score, costs, times, 3.0, buckets=60)
    uniform = allocate(costs, times, 3.0)
    assert weights @ depth[levels] < 0.4 * (weights @ depth[uniform])
    assert len(scored) == len(set(scored))  # each is scored once
    again = search(score, costs, times, 3.0, buckets=60)
    np.testing.assert_array_equal(levels, again)


def test_a_longer_search_scores_no_worse():
    """30 layers, of which five matter: redrawing and more starts both help."""
    rng = np.random.default_rng(2)
    depth = np.linspace(0, 1, 6) ** 2
    costs = np.tile(depth, (30, 1))
    times = np.tile(np.linspace(1, 0, 6), (30, 1))
    drawn = []
    for seed in range(3):
        weights = np.zeros(30)
        weights[rng.choice(30, 5, replace=False)] = 1

        def score(levels, weights=weights):
            return float(weights @ depth[levels])

        def best(seed=seed, score=score, **options):
            found = search(score, costs, times, 12.0, buckets=60, seed=seed, **options)
            return score(found)

        drawn.append(
            (
                best(starts=1, failures=0),
                best(starts=50, failures=0),
                best(starts=50, failures=40),
            )
        )
    one, many, longer = np.transpose(drawn)
    for better, worse in ((many, one), (longer, many)):
        assert (better <= worse).all()
        assert (better < worse).any()


ONE = [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0], ONE, 1), r"costs must be \(layers, levels\)"),
        ((ONE, [[-1.0, 1.0]], 1), "times must be finite and at least 0"),
        ((ONE, [[1.0, np.nan]], 1), "times must be finite and at least 0"),
        ((ONE, [[1.0, 2.0]] * 2, 3), "must have one shape"),
        ((ONE, [[3.0, 2.0]], 1), "at least 2, what the fastest levels take"),
        ((ONE, [[0.0, 0.0]], 0), "budget must be above 0"),
        ((ONE, ONE, np.inf), "budget must be above 0"),
    ],
)
def test_bad_tables_are_refused(arguments, message):
    for function in (allocate, lambda *rest: search(lambda levels: 0.0, *rest)):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="score must be a number, got NaN"):
        search(lambda levels: float("nan"), ONE, ONE, 1.0)
