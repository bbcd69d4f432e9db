"""Pulls towards a projection, beside float64 NumPy in the order of the papers."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from flax import serialization
from least_squares import START, gradient, loss_fn

from cram_jax import (
    cached,
    compose,
    fake_quant,
    identity,
    n_m,
    one_of,
    pulled,
    sam,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE, MOMENTUM, DECAY, RHO, PENALTY = 0.02, 0.9, 0.01, 0.1, 0.3


def train(optimizer, steps, params=None, state=None):
    @jax.jit
    def advance(params, state):
        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, START) if params is None else params
    state = optimizer.init(params) if state is None else state
    way = []
    for _ in range(steps):
        params, state = advance(params, state)
        way.append(params)
    return way, state


def safe_by_hand(steps, every, rho):
    """SAFE's algorithm 1: z and u are renewed after steps K - 1, 2K - 1, ..."""
    x = {name: value.copy() for name, value in START.items()}
    momentum = {name: np.zeros_like(value) for name, value in START.items()}
    project = lambda a: a * references.keep_largest([a], 3)[0]  # noqa: E731
    z, u, way = project(x["kernel"]), np.zeros((4, 3)), []
    for step in range(steps):
        grads = gradient(x)
        if rho:
            norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
            grads = gradient({name: x[name] + rho * grads[name] / norm for name in x})
        penalty = PENALTY * 0.5 * (1 - np.cos(np.pi * step / steps))
        grads["kernel"] = grads["kernel"] + penalty * (x["kernel"] - z + u)
        for name in x:
            momentum[name] = MOMENTUM * momentum[name] + grads[name] + DECAY * x[name]
            x[name] = x[name] - RATE * momentum[name]
        if (step + 1) % every == 0:
            z = project(x["kernel"] + u)
            u = u + x["kernel"] - z
        way.append({name: value.copy() for name, value in x.items()})
    return way


@pytest.mark.parametrize("rho", [0.0, RHO], ids=["admm", "safe"])
def test_with_a_dual_variable_it_is_safe_and_admm(rho):
    steps, every = 17, 4

    def strength(step):
        return PENALTY * 0.5 * (1 - jnp.cos(jnp.pi * step / steps))

    with jax.enable_x64(True):
        optimizer = optax.chain(
            sam(loss_fn, rho) if rho else optax.identity(),
            pulled(top_k(0.75), strength, every=every, dual=True),
            optax.add_decayed_weights(DECAY),
            optax.sgd(RATE, momentum=MOMENTUM),
        )
        way, _ = train(optimizer, steps)
    chex.assert_trees_all_close(
        way, safe_by_hand(steps, every, rho), rtol=1e-12, atol=1e-12
    )


def elsa_by_hand(steps, every):
    """z keeps the largest v z^2 with Adam's v, after steps K - 1, 2K - 1, ..."""
    x = {name: value.copy() for name, value in START.items()}
    m, v = ({name: np.zeros_like(x[name]) for name in x} for _ in range(2))
    z, u = x["kernel"] * references.keep_largest([x["kernel"]], 3)[0], np.zeros((4, 3))
    way, by_magnitude = [], 0
    for step in range(steps):
        grads = gradient(x)
        grads["kernel"] = grads["kernel"] + PENALTY * (x["kernel"] - z + u)
        for name in x:
            m[name] = 0.9 * m[name] + 0.1 * grads[name]
            v[name] = 0.95 * v[name] + 0.05 * grads[name] ** 2
            unbiased = v[name] / (1 - 0.95 ** (step + 1))
            mean = m[name] / (1 - 0.9 ** (step + 1))
            x[name] = x[name] - RATE * mean / (np.sqrt(unbiased) + 1e-8)
        if (step + 1) % every == 0:
            shifted = x["kernel"] + u
            mask = references.keep_largest([v["kernel"] * shifted**2], 3)[0]
            by_magnitude += (mask == references.keep_largest([shifted], 3)[0]).all()
            z = shifted * mask
            u = u + x["kernel"] - z
        way.append({name: value.copy() for name, value in x.items()})
    assert by_magnitude < steps // every  # or it would show nothing
    return way


def test_with_importance_and_adam_it_is_elsa():
    steps, every = 17, 4
    with jax.enable_x64(True):
        optimizer = optax.chain(
            pulled(top_k(0.75), PENALTY, every=every, dual=True, importance=0.95),
            optax.adam(RATE, b2=0.95),
        )
        way, state = train(optimizer, steps)
    chex.assert_trees_all_close(way, elsa_by_hand(steps, every), rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(state[0].squares, state[1][0].nu, rtol=1e-12)


def test_the_mean_of_squares_is_wide_and_keeps_its_dtype():
    params = [jnp.ones((2, 2), jnp.bfloat16)]
    updates = [jnp.array([[1.0, 2.0], [3.0, 4.0]])]
    rule = pulled(top_k(0.5), 0.0, dual=True, importance=0.999)
    state, _ = jax.lax.scan(
        lambda state, _: (rule.update(updates, state, params)[1], None),
        rule.init(params),
        length=1000,
    )
    # 1 - 0.999**1000, to the rounding of 1000 sums; bfloat16 would stop at 0.25.
    expected = np.square(updates[0]) * (1 - 0.999**1000)
    np.testing.assert_allclose(state.squares[0], expected, rtol=1e-4)


def test_importance_is_compared_in_full_for_narrow_parameters():
    """Of float16, whose products with gradients of 1e-6 would mostly be 0."""
    rng = np.random.default_rng(0)
    wide = [jnp.asarray(0.05 * rng.normal(size=(8, 8)).astype(np.float16), "float32")]
    updates = [jnp.asarray(1e-6 * np.exp(rng.normal(size=(8, 8))), "float32")]
    optimizer = pulled(top_k(0.5), 1e-9, every=2, importance=0.9)
    kept = []
    for dtype in ("float32", "float16"):
        params = [leaf.astype(dtype) for leaf in wide]
        state = optimizer.init(params)
        for _ in range(3):
            _, state = optimizer.update(updates, state, params)
        kept.append(state.target[0] != 0)
    np.testing.assert_array_equal(*kept)


@pytest.mark.parametrize("every", [1, 3])
def test_only_leaves_that_the_projector_may_change_are_pulled(every):
    optimizer = pulled(top_k(0.75), 0.5, every=every, dual=True)
    _, state = train(optax.chain(optimizer, optax.sgd(RATE)), 4)
    params = jax.tree.map(lambda leaf: leaf + 1, jax.tree.map(jnp.asarray, START))
    zero = optax.tree.zeros_like(params)
    updates, _ = optimizer.update(zero, state[0], params)
    assert not updates["bias"].any()
    assert updates["kernel"].any()


def test_gradients_of_numpy_are_taken():
    params = [np.array([[1.0, -4.0]])]
    optimizer = pulled(top_k(0.5), 0.5)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(updates[0], [[1.5, -4.0]])


def test_the_decay_of_sr_ste():
    """Equation 6: lambda (1 - M) w, with 2 of every 4 kept along the inputs."""
    params = jax.tree.map(jnp.asarray, START)
    optimizer = pulled(n_m(2, 4), 0.25)
    state = optimizer.init(params)
    assert state.target == state.dual == ()
    updates, _ = optimizer.update(optax.tree.zeros_like(params), state, params)
    mask = references.n_m(START["kernel"], 2, 4)
    np.testing.assert_allclose(
        updates["kernel"], 0.25 * (1 - mask) * START["kernel"], rtol=1e-6
    )


def test_a_target_is_renewed_only_when_it_is_due():
    optimizer = pulled(fake_quant(3), 0.0, every=3)
    chain, targets = optax.chain(optimizer, optax.sgd(RATE)), []
    params, state = None, None
    for _ in range(7):
        (params,), state = train(chain, 1, params, state)
        targets.append(np.asarray(state[0].target["kernel"]))
    changes = [not np.array_equal(*pair) for pair in itertools.pairwise(targets)]
    assert changes == [False, False, True, False, False, True]


def test_a_projector_that_draws_draws_anew_each_time():
    params = {"kernel": jnp.arange(1.0, 33.0).reshape(8, 4)}
    optimizer = pulled(one_of(top_k(0.25), top_k(0.75)), 1.0)
    state, counts = optimizer.init(params), []
    for _ in range(12):
        pulls, state = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), state, params
        )
        counts.append(int(jnp.count_nonzero(pulls["kernel"])))
    assert set(counts) == {8, 24}


def test_what_projectors_may_change():
    params = {"kernel": jnp.ones((3, 2)), "deep": jnp.ones((4, 2)), "bias": jnp.ones(2)}
    for projector, expected in {
        identity(): [False] * 3,
        top_k(0.5): [False, True, True],
        n_m(2, 4): [False, True, False],
        cached(n_m(2, 4), every=3): [False, True, False],
        compose(n_m(2, 4), fake_quant(4)): [False, True, True],
    }.items():
        assert projector.changes(params) == expected


def test_a_stored_run_goes_on_bit_for_bit():
    optimizer = optax.chain(
        pulled(cached(top_k(0.75), every=2), 0.3, every=3, dual=True),
        optax.sgd(RATE, momentum=MOMENTUM),
    )
    way, _ = train(optimizer, 9)
    part, state = train(optimizer, 4)
    stored = serialization.to_bytes((part[-1], state))
    like = way[0], optimizer.init(way[0])
    rest, _ = train(optimizer, 5, *serialization.from_bytes(like, stored))
    chex.assert_trees_all_equal(rest[-1], way[-1])


def test_its_state_names_its_parameters():
    optimizer = pulled(top_k(0.5), 0.1, dual=True)
    state = optimizer.init(jax.tree.map(jnp.asarray, START))
    named = optax.tree.map_params(optimizer, lambda leaf: "like a parameter", state)
    assert sum(isinstance(leaf, str) for leaf in jax.tree.leaves(named)) == 2 * 2


def test_a_step_may_donate_its_state():
    params = jax.tree.map(jnp.asarray, START)
    optimizer = pulled(top_k(0.5), 0.1, every=2)

    def advance(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    jax.jit(advance, donate_argnums=(0, 1))(params, optimizer.init(params))


def test_what_it_cannot_do_is_said_early():
    params = jax.tree.map(jnp.asarray, START)
    with pytest.raises(TypeError, match="projector must be a Projector, got 0.9"):
        pulled(0.9, 0.1)
    with pytest.raises(TypeError, match="strength must be a number or a schedule"):
        pulled(top_k(0.9), "strong")
    with pytest.raises(ValueError, match="strength must be at least 0 and finite"):
        pulled(top_k(0.9), -0.1)
    with pytest.raises(ValueError, match="importance must be from 0 to below 1"):
        pulled(top_k(0.5), 0.1, dual=True, importance=1.0)
    for wrong in ("a", [0.9], True):
        with pytest.raises(TypeError, match="importance must be a number from 0 to be"):
            pulled(top_k(0.5), 0.1, dual=True, importance=wrong)
    with pytest.raises(ValueError, match="importance needs a stored target: every"):
        pulled(top_k(0.5), 0.1, importance=0.9)
    with pytest.raises(ValueError, match="projector must only set entries to zero"):
        pulled(fake_quant(2), 0.1, dual=True, importance=0.9)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        pulled(top_k(0.9), 0.1, every=0)
    with pytest.raises(TypeError, match="dual must be True or False, got None"):
        pulled(top_k(0.9), 0.1, dual=None)
    optimizer = pulled(top_k(0.9), 0.1)
    with pytest.raises(ValueError, match="pulled needs params"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(ValueError, match="updates must have the structure of params"):
        optimizer.update(params["bias"], optimizer.init(params), params)
