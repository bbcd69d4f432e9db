import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cram_jax import (
    cached,
    compose,
    compress,
    cram,
    fake_quant,
    one_of,
    scheduled,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

PARAMS = {"kernel": jnp.arange(1.0, 21.0).reshape(4, 5)}
CUBIC = optax.polynomial_schedule(0.1, 0.85, 3, 6, 2)


def zeros_by_use(projector, uses, key=None):
    state, found = projector.init(PARAMS), []
    project = jax.jit(projector.project)
    for _ in range(uses):
        (params, _), state = project(PARAMS, state, key)
        found.append(int((params["kernel"] == 0).sum()))
    assert project._cache_size() == 1
    return found


def cubic(t):
    """Zhu and Gupta, with t0 = 2 and 6 steps."""
    share = 0.85 + (0.1 - 0.85) * (1 - min(max(t - 2, 0), 6) / 6) ** 3
    return int(np.floor(share * 20 + 1e-5))


def test_the_sparsity_is_that_of_the_schedule_at_each_use():
    assert zeros_by_use(scheduled(top_k, CUBIC), 11) == [cubic(t) for t in range(11)]


@pytest.mark.parametrize(
    ("options", "zeros"),
    [({}, 19), ({"scope": "layer"}, 19), ({"block": (4, 1)}, 16)],
    ids=["global", "layer", "block"],
)
def test_a_compiled_schedule_that_reaches_one_keeps_a_weight(options, zeros):
    rising = optax.linear_schedule(0.0, 1.0, 1)
    projector = scheduled(lambda share: top_k(share, **options), rising)
    assert zeros_by_use(projector, 2) == [0, zeros]


def test_inside_cached_it_counts_renewals():
    projector = cached(scheduled(top_k, CUBIC), every=3)
    assert zeros_by_use(projector, 9) == [cubic(t // 3) for t in range(9)]


def test_it_trains_in_one_program():
    def loss_fn(params):
        return jnp.sum(params["kernel"] ** 2)

    optimizer = cram(loss_fn, scheduled(top_k, CUBIC), rho=0)
    update = jax.jit(optimizer.update)
    state = optimizer.init(PARAMS)
    for step in range(5):
        updates, state = update(PARAMS, state, PARAMS)
        assert int((updates["kernel"] == 0).sum()) == cubic(step)
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda projector: projector,
        lambda projector: cached(projector, every=2),
        lambda projector: compose(projector, fake_quant(4)),
        lambda projector: one_of(fake_quant(4), projector),
    ],
)
def test_compress_refuses_what_follows_a_schedule(wrap):
    with pytest.raises(ValueError, match="projector must do the same at every use"):
        compress(PARAMS, wrap(scheduled(top_k, CUBIC)), key=0)


def test_it_says_what_it_needs():
    with pytest.raises(TypeError, match="schedule must be a function, got 0.9"):
        scheduled(top_k, 0.9)
    with pytest.raises(TypeError, match=r"make\(...\) must be a Projector, got 0.5"):
        scheduled(lambda number: number, lambda uses: 0.5).init(PARAMS)
    assert scheduled(top_k, CUBIC) == scheduled(top_k, CUBIC)
    assert scheduled(top_k, CUBIC).notes(PARAMS) == top_k(0.5).notes(PARAMS)
