"""Every method from a configuration, and the others beside NumPy or algebra."""

import dataclasses
import functools
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from flax import serialization

from cram_jax import keep_pruned, n_m, top_k
from experiments.config import OptimizerConfig
from experiments.errors import ConfigError
from experiments.methods.config import Method, PruningConfig, trains_for_one
from experiments.methods.estimators import dpf, sr_ste
from experiments.methods.frank_wolfe import frank_wolfe
from experiments.methods.lottery import lottery_tickets
from experiments.methods.masks import ac_dc
from experiments.training.optimizers import make_optimizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

METHODS = typing.get_args(Method)
STEPS = 12
BATCH = jnp.arange(12.0).reshape(4, 3) / 9
CONFIG = OptimizerConfig(
    rule="none",
    train_targets=("k50",),
    learning_rate=0.05,
    warmup=0.0,
    weight_decay=0.01,
    pruning=PruningConfig(every=2, strength=0.1),
)


def make_params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "first": {"kernel": jax.random.normal(keys[0], (3, 8)), "bias": jnp.ones(8)},
        "last": {"kernel": jax.random.normal(keys[1], (8, 2))},
    }


def loss_fn(params, batch, dropout_key=None):
    hidden = jnp.tanh(batch @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean((hidden @ params["last"]["kernel"] - 1) ** 2), None


@functools.cache
def program(config):
    optimizer = make_optimizer(config, loss_fn, STEPS)

    @jax.jit
    def advance(params, state):
        grads, _ = jax.grad(loss_fn, has_aux=True)(params, BATCH)
        updates, state = optimizer.update(grads, state, params, batch=BATCH)
        return optax.apply_updates(params, updates), state

    return optimizer, advance


def train(config, steps, params=None, state=None):
    optimizer, advance = program(config)
    params = make_params() if params is None else params
    state = optimizer.init(params) if state is None else state
    for _ in range(steps):
        params, state = advance(params, state)
    assert advance._cache_size() == 1
    return params, state


def configured(method):
    return dataclasses.replace(CONFIG, rule=method)


def zeros(params):
    kernels = [params["first"]["kernel"], params["last"]["kernel"]]
    return sum(int((kernel == 0).sum()) for kernel in kernels)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stored_goes_on_bit_for_bit(method):
    config = configured(method)
    half = train(config, 5)
    expected, _ = train(config, STEPS - 5, *half)
    stored = serialization.to_bytes(half)
    again = serialization.from_bytes(jax.tree.map(jnp.zeros_like, half), stored)
    params, _ = train(config, STEPS - 5, *jax.tree.map(jnp.asarray, again))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    loss = loss_fn(params, BATCH)[0]
    assert loss < loss_fn(make_params(), BATCH)[0]
    if method == "set":  # whose new weights may be those of a unit that is out
        assert zeros(params) >= 20  # of 40
    elif method in ("gradual", "acdc", "rigl", "platon", "movement"):
        assert zeros(params) == 20
    elif method not in ("str", "soft_movement", "l0"):
        assert zeros(params) == 0


@pytest.mark.parametrize("method", ["gradual", "acdc", "dpf"])
def test_methods_that_take_any_pattern_of_zeros(method):
    config = dataclasses.replace(configured(method), train_targets=("1:2",))
    optimizer = make_optimizer(config, loss_fn, STEPS)
    jax.eval_shape(optimizer.init, make_params())


def test_targets_that_a_method_cannot_train_for_are_refused():
    with pytest.raises(ConfigError, match="train_targets must be one target for rule"):
        dataclasses.replace(configured("gradual"), train_targets=("k50", "k90"))
    for method, target in (("gradual", "4bit"), ("rigl", "2:4"), ("movement", "dense")):
        config = dataclasses.replace(configured(method), train_targets=(target,))
        with pytest.raises(ConfigError, match=f"for the rule {method}, *such as k90"):
            make_optimizer(config, loss_fn, STEPS)
    with pytest.raises(ConfigError, match="ema must be 0 for rule gradual"):
        dataclasses.replace(configured("gradual"), ema=0.9)
    with pytest.raises(ConfigError, match="end must be from begin to 1, got 0.5"):
        dataclasses.replace(CONFIG, pruning=PruningConfig(begin=0.6, end=0.5))


def test_defaults_prune_some_weights_and_not_all():
    """With a strength of 1e-3 and scores of 0, L0 and STR would remove everything."""
    for rule, name, number in (
        ("str", "score", -3.0),
        ("l0", "strength", 0.1),
        ("l0", "score_rate", 0.1),
        ("admm", "strength", 1e-3),
        ("movement", "score", 0.0),
    ):
        assert PruningConfig().number(name, rule) == number
    assert PruningConfig(score=0.0).number("score", "str") == 0
    # Of an earlier version, which stored the numbers: the same method.
    stored = PruningConfig(strength=1e-3, score=0.0, score_rate=1e-2)
    assert stored.used_by("none") == PruningConfig().used_by("none")
    assert stored.used_by("gradual") == PruningConfig().used_by("gradual")
    assert stored.used_by("l0") != PruningConfig().used_by("l0")
    optimizer = make_optimizer(
        dataclasses.replace(configured("str"), pruning=PruningConfig()), loss_fn, STEPS
    )
    scores = optax.tree.get(optimizer.init(make_params()), "scores")
    assert {float(score) for score in jax.tree.leaves(scores)} == {-3.0}


def test_the_phases_of_ac_dc_are_those_of_its_imagenet_runs():
    """Compressed in the epochs 10-15, ..., 70-75 and from 85 on."""
    params = {"kernel": jnp.arange(1.0, 11.0).reshape(5, 2)}
    optimizer = ac_dc(optax.sgd(0.0), top_k, 0.9, begin=10, end=85, phase=5)
    state, compressed = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(100):
        compressed.append(not bool(state.masks["kernel"].all()))
        _, state = update(params, state, params)
    expected = [(10 <= e < 75 and e % 10 < 5) or e >= 85 for e in range(100)]
    assert compressed == expected


def quadratic(params):
    return jnp.sum((params["w"] - jnp.arange(8.0).reshape(4, 2)) ** 2) / 2


def test_dpf_is_feedback_to_all_weights():
    """Lin et al., algorithm 1: masks every 2 steps, the gradient at M w, whole."""
    start = np.random.default_rng(0).normal(size=(4, 2))
    with jax.enable_x64(True):
        optimizer = optax.chain(
            dpf(quadratic, top_k, 0.75, begin=0, end=6, every=2), optax.sgd(0.1)
        )
        params = {"w": jnp.asarray(start)}
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        w = start.copy()
        for t in range(10):
            if t % 2 == 0:
                share = 0.75 - 0.75 * (1 - min(t, 6) / 6) ** 3
                kept = 8 - int(np.floor(share * 8 + 1e-9))
                mask = references.keep_largest([w], kept)[0]
            w = w - 0.1 * (mask * w - np.arange(8.0).reshape(4, 2))
            updates, state = update(params, state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params["w"], w, rtol=1e-12)


def test_sr_ste_is_that_of_the_paper():
    """Equation 6, with weight decay and momentum behind it."""
    start = np.random.default_rng(0).normal(size=(4, 2))
    with jax.enable_x64(True):
        optimizer = optax.chain(
            sr_ste(quadratic, n_m(2, 4), 0.3),
            optax.add_decayed_weights(0.01),
            optax.sgd(0.1, momentum=0.9),
        )
        params = {"w": jnp.asarray(start)}
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        w, momentum = start.copy(), np.zeros((4, 2))
        for _ in range(6):
            mask = references.n_m(w, 2, 4)
            gradient = mask * w - np.arange(8.0).reshape(4, 2)
            gradient += 0.3 * (1 - mask) * w + 0.01 * w
            momentum = 0.9 * momentum + gradient
            w = w - 0.1 * momentum
            updates, state = update(params, state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params["w"], w, rtol=1e-12)


def test_frank_wolfe_steps_towards_a_sparse_vertex():
    """Zimmer et al.: m without dampening, the vertex of k entries, rescaled rate."""
    start = {
        "b": np.zeros(3),
        "w": np.random.default_rng(0).normal(size=(4, 3)),
    }
    grads = {
        "b": np.ones(3),
        "w": np.random.default_rng(1).normal(size=(4, 3)),
    }
    with jax.enable_x64(True):
        optimizer = frank_wolfe(0.1, density=0.25, radius=2.0, momentum=0.9)
        params = jax.tree.map(jnp.asarray, start)
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        own = {name: value.copy() for name, value in start.items()}
        momentum = {name: np.zeros_like(value) for name, value in start.items()}
        for _ in range(5):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            for name, kept in (("b", 3), ("w", 3)):
                tau = 2 * (np.linalg.norm(start[name]) or 1)
                momentum[name] = 0.9 * momentum[name] + grads[name]
                m = momentum[name]
                top = m * references.keep_largest([m], kept)[0]
                v = -tau * top / np.linalg.norm(top)
                away = np.linalg.norm(own[name] - v)
                gamma = min(0.1 * np.linalg.norm(m) / away, 1)
                own[name] = (1 - gamma) * own[name] + gamma * v
                np.testing.assert_allclose(params[name], own[name], rtol=1e-12)


def test_soft_thresholds_from_a_configuration_end_soft():
    """The last step hands over S(w, s), with fewer weights than it trained."""
    config = dataclasses.replace(
        configured("str"), pruning=PruningConfig(score=0.0), weight_decay=0.0
    )
    before, _ = train(config, STEPS - 1)
    after, state = train(config, STEPS)
    assert zeros(before) == 0
    assert zeros(after) > 0
    assert set(state[1].scores) == {"first/kernel", "last/kernel"}


def test_tickets_are_rewound_and_train_under_their_masks():
    early = {"w": np.random.default_rng(0).normal(size=(4, 5))}
    goal = np.random.default_rng(1).normal(size=(4, 5))

    def steps(params, masks):
        optimizer = optax.chain(optax.sgd(0.3), keep_pruned(masks))
        state = optimizer.init(params)
        for _ in range(4):
            grads = {"w": params["w"] - goal}
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    mask = np.ones((4, 5), bool)
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), early)
    for level, (params, masks) in enumerate(lottery_tickets(start, steps, 3)):
        np.testing.assert_array_equal(masks["w"], mask)
        trained = mask * (goal + 0.7**4 * (early["w"] - goal))
        np.testing.assert_allclose(params["w"], trained, rtol=2e-5, atol=1e-6)
        removed = int(np.floor((1 - 0.8 ** (level + 1)) * 20 + 1e-9))
        mask = references.keep_largest([trained], 20 - removed)[0]


def test_platon_ends_pruned_even_if_it_prunes_to_the_end():
    own = PruningConfig(begin=0.0, end=1.0, every=5)
    config = dataclasses.replace(configured("platon"), pruning=own)
    optimizer = make_optimizer(config, loss_fn, STEPS)
    params = make_params()
    state = optimizer.init(params)

    @jax.jit
    def advance(params, state):
        grads, _ = jax.grad(loss_fn, has_aux=True)(params, BATCH)
        updates, state = optimizer.update(grads, state, params, batch=BATCH)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = advance(params, state)
    assert any((leaf == 0).any() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("method", ["gradual", "rigl", "movement", "admm"])
def test_weights_that_are_pruned_cannot_be_frozen(method):
    config = dataclasses.replace(configured(method), frozen="first/")
    with pytest.raises(ConfigError, match=f"frozen must match no weights.*{method}"):
        make_optimizer(config, loss_fn, STEPS).init(make_params())


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_stay(method):
    config = dataclasses.replace(configured(method), frozen="bias", base="adam")
    optimizer = make_optimizer(config, loss_fn, STEPS)
    params = make_params()
    grads = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(functools.partial(optimizer.update, batch=BATCH))
    updates, _ = update(grads, optimizer.init(params), params)
    assert not updates["first"]["bias"].any()
    assert updates["first"]["kernel"].any()


@pytest.mark.parametrize("method", METHODS)
def test_the_state_keeps_its_types_whatever_the_loss_has(method):
    """A loop needs that, and a checkpoint that is to be restored."""

    def half(params, batch, dropout_key=None):
        loss, others = loss_fn(params, batch)
        return loss.astype(jnp.bfloat16), others

    optimizer = make_optimizer(configured(method), half, STEPS)
    params = make_params()
    state = optimizer.init(params)
    update = functools.partial(optimizer.update, batch=BATCH)
    _, after = jax.eval_shape(update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda: state))


@pytest.mark.parametrize("method", [m for m in METHODS if trains_for_one(m)])
def test_methods_that_prune_have_no_plain_steps(method):
    """They count all steps; some of them would not reach their target."""
    with pytest.raises(ConfigError, match=f"plain_steps must be 0 for rule {method}"):
        dataclasses.replace(configured(method), plain_steps=0.5)
