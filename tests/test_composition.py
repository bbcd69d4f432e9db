"""What an optax user puts around and behind our transformations.

Each test sets the result beside an update that is written out by hand.
"""

import chex
import equinox
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state

import cram_jax
from cram_jax import cram_plus, top_k

pytestmark = pytest.mark.usefixtures("quick_compilation")

RHO = 0.1
PROJECTOR = top_k(0.5)


def make_params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "first": {"kernel": jax.random.normal(keys[0], (4, 8)), "bias": jnp.ones(8)},
        "last": {"kernel": jax.random.normal(keys[1], (8, 1))},
    }


def make_batch(size=8):
    x = jax.random.normal(jax.random.key(1), (size, 4))
    return x, jnp.sum(x, axis=1, keepdims=True)


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean((hidden @ params["last"]["kernel"] - y) ** 2)


def by_hand(loss, params, *arguments):
    """Equation 4 with sparse gradients, in four lines."""
    grads = jax.grad(loss)(params, *arguments)
    perturbed = jax.tree.map(lambda p, g: p + RHO * g, params, grads)
    compressed, masks = cram_jax.compress(perturbed, PROJECTOR)
    inner = jax.grad(loss)(compressed, *arguments)
    return jax.tree.map(lambda g, m, i: g + jnp.where(m, i, 0), grads, masks, inner)


def train(optimizer, steps=3, loss=loss_fn, **extra_args):
    params, batch = make_params(), make_batch()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        grads = jax.grad(loss)(params, batch)
        updates, state = update(grads, state, params, batch=batch, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def train_by_hand(descend, steps=3):
    params, batch = make_params(), make_batch()
    state = descend.init(params)
    for _ in range(steps):
        updates, state = descend.update(by_hand(loss_fn, params, batch), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(ours, expected):
    chex.assert_trees_all_close(ours, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "descend",
    {
        "sgd": optax.sgd(0.1, momentum=0.9),
        "adamw": optax.adamw(0.01),
        "lion": optax.lion(0.01),
        "clipped_after": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
        "decayed_before_momentum": optax.chain(
            optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
        ),
        "decayed_after_adam": optax.chain(
            optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.01)
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_follows_sees_an_ordinary_gradient(descend):
    _, descend = descend
    chain = optax.chain(cram_plus(loss_fn, PROJECTOR, RHO), descend)
    assert_close(train(chain)[0], train_by_hand(descend))


def test_clipping_before_shortens_the_ascent():
    params, batch = make_params(), make_batch()
    chain = optax.chain(
        optax.clip_by_global_norm(0.5), cram_jax.cram(loss_fn, PROJECTOR, RHO)
    )
    grads = jax.grad(loss_fn)(params, batch)
    clipped, _ = optax.clip_by_global_norm(0.5).update(grads, optax.EmptyState())
    alone = cram_jax.cram(loss_fn, PROJECTOR, RHO)
    expected, _ = alone.update(clipped, alone.init(params), params, batch=batch)
    updates, _ = chain.update(grads, chain.init(params), params, batch=batch)
    assert_close(updates, expected)


def test_inject_hyperparams_with_its_static_arguments():
    make = optax.inject_hyperparams(cram_plus, static_args=("loss_fn", "projector"))
    injected = optax.chain(make(loss_fn, PROJECTOR, rho=RHO), optax.sgd(0.1))
    params, state = train(injected)
    assert_close(params, train_by_hand(optax.sgd(0.1)))
    np.testing.assert_allclose(state[0].hyperparams["rho"], RHO)


def explosive(params, batch, factor):
    return loss_fn(params, batch) * factor


def test_apply_if_finite_around_it_rejects_a_step_and_its_state():
    chain = optax.chain(cram_plus(loss_fn, PROJECTOR, RHO), optax.sgd(0.1))
    optimizer = optax.apply_if_finite(chain, max_consecutive_errors=5)
    params, batch = make_params(), make_batch()
    state = optimizer.init(params)
    infinite = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), params)
    updates, after = optimizer.update(infinite, state, params, batch=batch)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_apply_if_finite_behind_it_sees_the_compressed_pass_too():
    guarded = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=5)
    optimizer = optax.chain(cram_plus(explosive, PROJECTOR, RHO), guarded)
    params, batch = make_params(), make_batch()
    grads = jax.grad(loss_fn)(params, batch)
    update = jax.jit(optimizer.update)
    updates, state = update(
        grads, optimizer.init(params), params, batch=batch, factor=jnp.nan
    )
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    updates, state = update(grads, state, params, batch=batch, factor=1.0)
    assert int(state[0].count) == 2
    assert_close(
        updates, jax.tree.map(lambda u: -0.1 * u, by_hand(loss_fn, params, batch))
    )


def test_a_gradient_that_is_not_finite_passes_through():
    params, batch = make_params(), make_batch()
    rule = cram_plus(loss_fn, PROJECTOR, RHO)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    updates, state = rule.update(grads, rule.init(params), params, batch=batch)
    assert all(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(updates))
    assert int(state.count) == 1


@pytest.mark.parametrize("every", [1, 2, 3])
def test_conditionally_transform_every_kth_step(every):
    rule = optax.conditionally_transform(
        cram_plus(loss_fn, PROJECTOR, RHO), lambda step: step % every == 0
    )
    ours, state = train(optax.chain(rule, optax.sgd(0.1)), steps=4)
    params, batch = make_params(), make_batch()
    for step in range(4):
        grads = jax.grad(loss_fn)(params, batch)
        if step % every == 0:
            grads = by_hand(loss_fn, params, batch)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert_close(ours, params)
    assert int(state[0].inner_state.count) == len(range(0, 4, every))


def test_reduce_on_plateau_gets_its_value():
    descend = optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    )
    chain = optax.chain(cram_plus(loss_fn, PROJECTOR, RHO), descend)
    _, state = train(chain, steps=5, value=1.0)
    assert float(optax.tree.get(state, "scale")) < 1


def test_a_line_search_shares_its_loss_with_the_rule():
    params, batch = make_params(), make_batch()
    grads = jax.grad(loss_fn)(params, batch)
    value = loss_fn(params, batch)
    chain = optax.chain(
        cram_plus(None, PROJECTOR, RHO),
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=10),
    )
    updates, _ = chain.update(
        grads,
        chain.init(params),
        params,
        value=value,
        grad=grads,
        value_fn=loss_fn,
        batch=batch,
    )
    assert loss_fn(optax.apply_updates(params, updates), batch) < value


def frozen_first(params):
    return {name: name for name in params}


def test_freezing_after_it_leaves_the_loss_whole():
    descend = optax.partition(
        {"first": optax.set_to_zero(), "last": optax.sgd(0.1)}, frozen_first
    )
    chain = optax.chain(cram_plus(loss_fn, PROJECTOR, RHO), descend)
    ours, _ = train(chain)
    assert_close(ours, train_by_hand(descend))
    chex.assert_trees_all_equal(ours["first"], make_params()["first"])


def test_masked_after_it():
    mask = {"first": {"kernel": True, "bias": False}, "last": {"kernel": True}}
    descend = optax.chain(
        optax.masked(optax.add_decayed_weights(0.5), mask), optax.sgd(0.1)
    )
    chain = optax.chain(cram_plus(loss_fn, PROJECTOR, RHO), descend)
    assert_close(train(chain)[0], train_by_hand(descend))


def test_accumulating_in_the_loss_gives_the_answer_of_the_whole_batch():
    def accumulated(params, batch):
        """Four micro-batches, whose activations are not kept."""
        parts = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
        micro = jax.checkpoint(lambda part: loss_fn(params, part))
        total, _ = jax.lax.scan(
            lambda total, part: (total + micro(part), None), 0.0, parts
        )
        return total / 4

    ours, _ = train(
        optax.chain(cram_plus(accumulated, PROJECTOR, RHO), optax.sgd(0.1)),
        loss=accumulated,
    )
    assert_close(ours, train_by_hand(optax.sgd(0.1)))


def test_bfloat16_parameters_with_float32_masters():
    def mixed(masters, batch):
        """The model computes in bfloat16; the optimiser sees float32."""
        narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), masters)
        return loss_fn(narrow, batch).astype(jnp.float32)

    params, batch = make_params(), make_batch()
    rule = cram_plus(mixed, PROJECTOR, RHO)
    grads = jax.grad(mixed)(params, batch)
    updates, _ = rule.update(grads, rule.init(params), params, batch=batch)
    chex.assert_trees_all_equal_dtypes(updates, params)
    assert_close(updates, by_hand(mixed, params, batch))


def test_both_passes_get_the_same_dropout():
    keys = []

    def noisy(params, batch, dropout_key):
        keys.append(dropout_key)
        x, y = batch
        kept = jax.random.bernoulli(dropout_key, 0.5, x.shape)
        return loss_fn(params, (jnp.where(kept, x, 0), y))

    params, batch = make_params(), make_batch()
    rule = cram_plus(noisy, PROJECTOR, RHO)
    key = jax.random.key(5)
    grads = jax.grad(noisy)(params, batch, key)
    updates, _ = rule.update(
        grads, rule.init(params), params, batch=batch, dropout_key=key
    )
    assert all((jax.random.key_data(k) == jax.random.key_data(key)).all() for k in keys)
    assert_close(updates, by_hand(noisy, params, batch, key))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(jnp.tanh(linen.Dense(8)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


def test_the_models_of_an_ensemble_train_as_each_would_alone():
    projector = cram_jax.one_of(
        top_k(0.5), cram_jax.cached(top_k(0.9), every=2), cram_jax.fake_quant(4)
    )

    def run(params, key):
        rule = cram_plus(loss_fn, projector, RHO, key=key)
        optimizer = optax.chain(rule, optax.adam(0.01))

        def step(carry, _):
            params, state = carry
            grads = jax.grad(loss_fn)(params, make_batch())
            updates, state = optimizer.update(grads, state, params, batch=make_batch())
            params = optax.apply_updates(params, updates)
            return (params, state), state[0].compressed_loss

        start = params, optimizer.init(params)
        (params, _), losses = jax.lax.scan(step, start, length=4)
        return cram_jax.compress(params, top_k(0.9)), losses

    models = jax.tree.map(lambda leaf: jnp.stack([leaf, 1 - leaf]), make_params())
    keys = jax.random.split(jax.random.key(3))
    together = jax.jit(jax.vmap(run))(models, keys)
    alone = jax.jit(run)
    for index in range(2):
        ours, expected = (
            jax.tree.map(lambda leaf, i=index: leaf[i], together),
            alone(jax.tree.map(lambda leaf, i=index: leaf[i], models), keys[index]),
        )
        assert_close(ours, expected)
    assert len({tuple(losses.tolist()) for losses in together[1]}) == 2


def linen_dict():
    model = Linen()
    params = model.init(jax.random.key(0), make_batch()[0])["params"]
    return params, lambda params, x: model.apply({"params": params}, x)


def nnx_state(pure):
    graph, params = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)
    if pure:
        params = nnx.as_pure(params)
    return params, lambda params, x: nnx.merge(graph, params, copy=True)(x)


def equinox_module():
    model = equinox.nn.MLP(4, 1, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = equinox.partition(model, equinox.is_inexact_array)
    return params, lambda params, x: jax.vmap(equinox.combine(params, static))(x)


def haiku_dict():
    model = haiku.without_apply_rng(
        haiku.transform(lambda x: haiku.Linear(1)(jnp.tanh(haiku.Linear(8)(x))))
    )
    return model.init(jax.random.key(0), make_batch()[0]), model.apply


TREES = {
    "linen dict": linen_dict,
    "nnx state": lambda: nnx_state(pure=False),
    "pure nnx state": lambda: nnx_state(pure=True),
    "equinox module": equinox_module,
    "haiku dict": haiku_dict,
    "tuple": lambda: (
        (jnp.ones((4, 2)), jnp.full((2, 1), 0.5)),
        lambda params, x: jnp.tanh(x @ params[0]) @ params[1],
    ),
    "single array": lambda: (jnp.arange(4.0).reshape(4, 1), lambda w, x: x @ w),
}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_parameters_of_any_library(make):
    params, apply = make()

    def loss(params, batch):
        x, y = batch
        return jnp.mean((apply(params, x) - y) ** 2)

    batch = make_batch()
    rule = cram_plus(loss, PROJECTOR, RHO)
    grads = jax.grad(loss)(params, batch)
    updates, _ = jax.jit(rule.update)(grads, rule.init(params), params, batch=batch)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert_close(updates, by_hand(loss, params, batch))


def test_nnx_optimizer_forwards_the_arguments():
    model = Nnx(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def loss(params, batch):
        x, y = batch
        return jnp.mean((nnx.merge(graph, params, copy=True)(x) - y) ** 2)

    optimizer = nnx.Optimizer(
        model,
        optax.chain(cram_plus(loss, PROJECTOR, RHO), optax.sgd(0.1)),
        wrt=nnx.Param,
    )
    batch = make_batch()
    grads = jax.grad(loss)(params, batch)
    before = nnx.as_pure(params)
    expected = jax.tree.map(
        lambda p, u: p - 0.1 * u, before, by_hand(loss, before, batch)
    )
    optimizer.update(model, grads, batch=batch)  # in place
    assert_close(nnx.as_pure(nnx.state(model, nnx.Param)), expected)


def test_a_recipe_for_the_train_state_of_flax():
    """Its apply_gradients forwards no arguments: call the optimiser and replace."""
    chain = optax.chain(cram_plus(loss_fn, PROJECTOR, RHO), optax.sgd(0.1))
    batch = make_batch()
    state = train_state.TrainState.create(apply_fn=None, params=make_params(), tx=chain)
    for _ in range(3):
        grads = jax.grad(loss_fn)(state.params, batch)
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, batch=batch
        )
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )
    assert_close(state.params, train_by_hand(optax.sgd(0.1)))


def of_square(params):
    return jnp.sum(params**2)


def updates_of(transformation, params):
    return transformation.update(params, transformation.init(params), params)[0]


HALF = {
    "top_k": lambda p, half: cram_jax.compress(p, top_k(half)).params,
    "cram": lambda p, half: updates_of(cram_plus(of_square, PROJECTOR, half), p),
    "pulled": lambda p, half: updates_of(cram_jax.pulled(PROJECTOR, half), p),
    "scored": lambda p, half: cram_jax.scored(p, {"": p}, half),
    "thresholded": lambda p, half: cram_jax.thresholded(p, {"": p}, half),
    "loss_scaled": lambda p, half: jax.grad(cram_jax.loss_scaled(of_square, half))(p),
}


@pytest.mark.parametrize("function", HALF.values(), ids=HALF)
def test_an_array_that_a_jitted_function_holds_is_a_number(function):
    params, half = jnp.arange(8.0).reshape(2, 4), jnp.array(0.5)
    ours = jax.jit(lambda params: function(params, half))(params)
    np.testing.assert_allclose(ours, function(params, 0.5), rtol=1e-6)
