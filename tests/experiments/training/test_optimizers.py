"""The chains that a configuration spells, on three small arrays."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.config import OptimizerConfig
from experiments.errors import ConfigError
from experiments.training.optimizers import learning_rate, make_optimizer

ADAM = OptimizerConfig(
    rule="none", base="adam", learning_rate=0.1, warmup=0.0, weight_decay=0.0
)


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "embeddings": jax.random.normal(keys[0], (3, 4)),
        "layer": {"kernel": jax.random.normal(keys[1], (4, 5)), "bias": jnp.ones(5)},
        "head": jax.random.normal(keys[2], (5, 1)),
    }


def loss_fn(params, batch, dropout_key=None):
    hidden = jnp.tanh(batch @ params["embeddings"])
    hidden = jnp.tanh(hidden @ params["layer"]["kernel"] + params["layer"]["bias"])
    return jnp.sum((hidden @ params["head"]) ** 2), None


BATCH = jnp.arange(6.0).reshape(2, 3) / 5


def step(optimizer, state, params, seed=0):
    key = jax.random.key(seed)
    grads, _ = jax.grad(loss_fn, has_aux=True)(params, BATCH)
    return optimizer.update(grads, state, params, batch=BATCH, dropout_key=key)


def assert_close(one, other):
    jax.tree.map(
        # float32: sums in another order
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        one,
        other,
    )


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam_is_that_of_optax_with_decoupled_decay(decay, params):
    config = dataclasses.replace(ADAM, weight_decay=decay, schedule="linear")
    ours = make_optimizer(config, loss_fn, 10)
    theirs = optax.adamw(lambda step: 0.1 * (1 - step / 10), weight_decay=decay)
    states = [ours.init(params), theirs.init(params)]
    both = [params, params]
    for _ in range(3):
        for i, optimizer in enumerate((ours, optax.with_extra_args_support(theirs))):
            updates, states[i] = step(optimizer, states[i], both[i])
            both[i] = optax.apply_updates(both[i], updates)
    assert_close(*both)


def test_a_linear_schedule_rises_and_falls_along_lines():
    config = dataclasses.replace(ADAM, schedule="linear", warmup=0.2)
    rates = [float(learning_rate(config, 10)(step)) for step in range(11)]
    falling = [0.1 * (1 - i / 8) for i in range(9)]
    np.testing.assert_allclose(rates, [0, 0.05, *falling], atol=1e-7)


@pytest.mark.parametrize("method", ["cram_plus", "sam"])
def test_frozen_parameters_stay_and_take_no_part_in_the_ascent(method, params):
    config = dataclasses.replace(
        ADAM,
        rule=method,
        train_targets=("dense",),
        rho=0.5,
        frozen="^embeddings",
        weight_decay=0.1,
    )
    optimizer = make_optimizer(config, loss_fn, 10)
    state = optimizer.init(params)
    updates, after = step(optimizer, state, params)
    assert not updates["embeddings"].any()
    assert updates["layer"]["kernel"].all()

    # The loss at the perturbed parameters, with the embeddings where they are.
    grads, _ = jax.grad(loss_fn, has_aux=True)(params, BATCH)
    moved = {name: grads[name] for name in ("layer", "head")}
    radius = 0.5 if method == "cram_plus" else 0.5 / optax.tree.norm(moved)
    perturbed = params | {
        name: optax.tree.add_scale(params[name], radius, grads[name]) for name in moved
    }
    expected, _ = loss_fn(perturbed, BATCH)
    found = optax.tree.get(after, "compressed_loss")
    assert found == pytest.approx(float(expected), rel=1e-5)
    moments = optax.tree.get(after, "mu")
    assert len(jax.tree.leaves(moments)) == 3  # layer and head


def test_pruned_weights_take_no_part_in_the_ascent(params):
    """Nor in the norm of its gradient: SAM of the network that is left."""
    mask = np.arange(params["head"].size).reshape(params["head"].shape) % 2 == 0
    params = params | {"head": params["head"] * mask}
    config = dataclasses.replace(ADAM, rule="sam", rho=0.5, keep_pruned=True)
    optimizer = make_optimizer(config, loss_fn, 10)
    updates, after = step(optimizer, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["head"] != 0, mask)

    grads, _ = jax.grad(loss_fn, has_aux=True)(params, BATCH)
    grads = grads | {"head": grads["head"] * mask}
    radius = 0.5 / optax.tree.norm(grads)
    expected, _ = loss_fn(optax.tree.add_scale(params, radius, grads), BATCH)
    found = optax.tree.get(after, "compressed_loss")
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("pattern", ["nothing", "."])
def test_a_pattern_that_freezes_nothing_or_all_is_refused(pattern, params):
    optimizer = make_optimizer(dataclasses.replace(ADAM, frozen=pattern), loss_fn, 10)
    with pytest.raises(ConfigError, match="frozen must match some parameters"):
        optimizer.init(params)


def test_a_plain_step_is_that_of_the_base_optimiser(params):
    """And leaves the state of the rule, such as its draws, as it was."""
    config = dataclasses.replace(
        ADAM, rule="cram_plus", train_targets=("k50", "k80"), base="sgd"
    )
    state = make_optimizer(config, loss_fn, 10).init(params)
    plain = make_optimizer(config, loss_fn, 10, plain=True)
    base = make_optimizer(dataclasses.replace(config, rule="none"), loss_fn, 10)
    updates, after = step(plain, state, params)
    assert_close(updates, step(base, base.init(params), params)[0])
    chex.assert_trees_all_equal(after[0], state[0])


@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_a_gradient_is_clipped_before_the_base_optimiser(clip, params):
    sgd = dataclasses.replace(
        ADAM, base="sgd", learning_rate=1.0, momentum=0.0, nesterov=False
    )
    config = dataclasses.replace(sgd, schedule="constant", clip_norm=clip)
    optimizer = make_optimizer(config, loss_fn, 10, 0)
    updates, _ = step(optimizer, optimizer.init(params), params)
    gradient, _ = jax.grad(loss_fn, has_aux=True)(params, BATCH)
    scale = clip / optax.tree.norm(gradient) if clip else 1.0
    assert_close(updates, jax.tree.map(lambda g: -scale * g, gradient))
