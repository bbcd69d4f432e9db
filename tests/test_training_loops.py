"""The loops of docs/guide/training_loops.md, each against steps written by hand.

They are those of Flax's mnist and imagenet examples, of Equinox's and of Haiku's,
with smaller networks.
"""

import functools
from typing import Any

import chex
import equinox
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

from cram_jax import compress, cram_plus, keep_pruned, loss_scaled, top_k

pytestmark = pytest.mark.usefixtures("quick_compilation")

RHO, RATE, PROJECTOR = 0.1, 0.05, top_k(0.5)
STEPS = 40


def make_optimizer(loss_fn=None, **options):
    return optax.chain(cram_plus(loss_fn, PROJECTOR, RHO, **options), optax.sgd(RATE))


def make_batch(size=16):
    x = jax.random.normal(jax.random.key(1), (size, 4))
    return x, jnp.sum(x, axis=1, keepdims=True)


def squared_error(outputs, y):
    return jnp.mean((outputs - y) ** 2)


@functools.partial(jax.jit, static_argnums=0)
def direction(loss_at, params):
    """Equation 4 with sparse gradients."""
    grads = jax.grad(loss_at)(params)
    perturbed = jax.tree.map(lambda p, g: p + RHO * g, params, grads)
    compressed, masks = compress(perturbed, PROJECTOR)
    inner = jax.grad(loss_at)(compressed)
    return jax.tree.map(lambda g, m, i: g + jnp.where(m, i, 0), grads, masks, inner)


def by_hand(loss_at, params):
    return jax.tree.map(lambda p, u: p - RATE * u, params, direction(loss_at, params))


def assert_close(ours, expected, **tolerance):
    # float32 sums in another order, over values of about 1.
    chex.assert_trees_all_close(
        ours, expected, **{"rtol": 2e-5, "atol": 2e-6} | tolerance
    )


def assert_learns(losses, share=0.2):
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < share * losses[0]


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1)
        self.output = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x, rngs):
        x = jnp.tanh(self.norm(self.hidden(x)))
        return self.output(self.dropout(x, rngs=rngs))


def nnx_loss(model, rngs, batch):
    x, y = batch
    outputs = model(x, rngs)
    return squared_error(outputs, y), outputs


@nnx.jit
def nnx_step(model, optimizer, rngs, batch):
    graph, _, rest = nnx.split(model, nnx.Param, ...)  # new
    before = nnx.clone(rngs)  # new
    grad_fn = nnx.value_and_grad(nnx_loss, has_aux=True)
    (loss, _), grads = grad_fn(model, rngs, batch)
    optimizer.update(  # new: value_fn
        model,
        grads,
        value_fn=lambda params: nnx_loss(
            nnx.merge(graph, params, rest, copy=True), nnx.clone(before), batch
        ),
    )
    return loss


def test_flax_nnx_with_batch_norm_and_dropout():
    model, rngs, batch = Nnx(nnx.Rngs(0)), nnx.Rngs(dropout=1), make_batch()
    optimizer = nnx.Optimizer(model, make_optimizer(has_aux=True), wrt=nnx.Param)
    graph, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    dropout = nnx.clone(rngs)

    def dense_pass(params):
        twin = nnx.merge(graph, params, rest, copy=True)
        loss, _ = nnx_loss(twin, nnx.clone(dropout), batch)
        return loss, nnx.as_pure(nnx.state(twin, nnx.BatchStat))

    params = nnx.as_pure(params)
    expected = by_hand(lambda params: dense_pass(params)[0], params)
    statistics = dense_pass(params)[1]
    losses = [nnx_step(model, optimizer, rngs, batch)]
    assert_close(nnx.as_pure(nnx.state(model, nnx.Param)), expected)
    assert_close(nnx.as_pure(nnx.state(model, nnx.BatchStat)), statistics)
    losses += [nnx_step(model, optimizer, rngs, batch) for _ in range(STEPS)]
    assert_learns(losses)


@pytest.mark.parametrize("knows_masks", [False, True])
def test_keep_pruned_under_the_nnx_optimizer(knows_masks):
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    pruned, masks = compress(nnx.as_pure(nnx.state(model)), PROJECTOR)
    nnx.update(model, pruned)
    tx = optax.chain(optax.sgd(1.0), keep_pruned(masks if knows_masks else None))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
    expected = jnp.where(masks["kernel"], pruned["kernel"] - 2, 0)
    np.testing.assert_array_equal(model.kernel[...], expected)
    np.testing.assert_array_equal(model.bias[...], pruned["bias"] - 2)


class Narrow(linen.Module):
    """Computes in float16."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(16, dtype=jnp.float16)(x.astype(jnp.float16))
        x = linen.BatchNorm(not train, momentum=0.9, dtype=jnp.float16)(x)
        return linen.Dense(1, dtype=jnp.float16)(jnp.tanh(x)).astype(jnp.float32)


# The gradients of a loss this small do not fit into float16.
SMALL = 1e-6


class ScaledState(TrainState):
    batch_stats: Any
    dynamic_scale: DynamicScale


def imagenet_step(state, batch):
    """The step of Flax's imagenet example."""
    x, y = batch

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, new = state.apply_fn(variables, x, True, mutable=["batch_stats"])
        return SMALL * squared_error(outputs, y), (new, outputs)

    grad_fn = state.dynamic_scale.value_and_grad(
        loss_fn, has_aux=True, axis_name="batch"
    )
    dynamic_scale, is_finite, (loss, (new, _)), grads = grad_fn(state.params)
    updates, opt_state = state.tx.update(  # new, for state.apply_gradients
        grads,
        state.opt_state,
        state.params,
        value_fn=loss_scaled(loss_fn, dynamic_scale.scale),
    )
    after = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        batch_stats=new["batch_stats"],
        dynamic_scale=dynamic_scale,
    )
    is_finite &= jnp.isfinite(optax.tree.norm(updates))  # new
    select = functools.partial(jnp.where, is_finite)
    after = after.replace(
        params=jax.tree.map(select, after.params, state.params),
        opt_state=jax.tree.map(select, after.opt_state, state.opt_state),
    )
    return after, loss, updates


def test_flax_train_state_with_pmap_batch_norm_and_dynamic_scale():
    model, batch = Narrow(), make_batch()
    variables = model.init(jax.random.key(0), batch[0], True)
    tx = optax.chain(
        cram_plus(None, PROJECTOR, RHO / SMALL, has_aux=True, axis_name="batch"),
        optax.sgd(RATE / SMALL),
    )
    state = ScaledState.create(
        apply_fn=model.apply,
        tx=tx,
        dynamic_scale=DynamicScale(),
        **variables,
    )

    def wide(params):
        """The same in float32, and not as small."""
        x, y = batch
        x = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        x = (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)
        x = jnp.tanh(x * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"])
        x = x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
        return squared_error(x, y)

    step = jax.pmap(imagenet_step, axis_name="batch")
    state, batches = jax.tree.map(lambda a: jnp.asarray(a)[None], (state, batch))
    expected = jax.tree.map(lambda u: -RATE * u, direction(wide, variables["params"]))
    state, loss, updates = step(state, batches)
    # float16 has ten bits.
    updates = jax.tree.map(lambda leaf: leaf[0], updates)
    assert_close(updates, expected, rtol=0.05, atol=2e-3)
    losses = [loss[0]]
    for _ in range(STEPS):
        state, loss, _ = step(state, batches)
        losses.append(loss[0])
    assert_learns(losses)


def test_equinox():
    x, y = make_batch()

    def loss_fn(model, x, y):
        return squared_error(jax.vmap(model)(x), y)

    @equinox.filter_jit
    def make_step(model, opt_state, x, y):
        loss, grads = equinox.filter_value_and_grad(loss_fn)(model, x, y)
        params, static = equinox.partition(model, equinox.is_inexact_array)
        updates, opt_state = optim.update(
            grads,
            opt_state,
            params,
            value_fn=lambda params: loss_fn(
                equinox.combine(params, static), x, y
            ),  # new
        )
        return equinox.apply_updates(model, updates), opt_state, loss

    model = equinox.nn.MLP(4, 1, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = equinox.partition(model, equinox.is_inexact_array)
    optim = make_optimizer()
    opt_state = optim.init(params)
    expected = by_hand(lambda p: loss_fn(equinox.combine(p, static), x, y), params)
    model, opt_state, loss = make_step(model, opt_state, x, y)
    assert_close(equinox.filter(model, equinox.is_inexact_array), expected)
    losses = [loss]
    for _ in range(STEPS):
        model, opt_state, loss = make_step(model, opt_state, x, y)
        losses.append(loss)
    assert_learns(losses)


def test_haiku():
    network = haiku.without_apply_rng(
        haiku.transform(lambda x: haiku.Linear(1)(jnp.tanh(haiku.Linear(16)(x))))
    )
    batch = make_batch()

    def loss_fn(params, batch):
        x, y = batch
        return squared_error(network.apply(params, x), y)

    optimizer = make_optimizer(loss_fn)  # new
    params = network.init(jax.random.key(0), batch[0])
    descend(
        lambda params, opt_state, grads: optimizer.update(
            grads,
            opt_state,
            params,
            batch=batch,  # new
        ),
        optimizer.init(params),
        params,
        lambda params: loss_fn(params, batch),
    )


def descend(update, opt_state, params, loss_at):
    """The rest of a plain loop; its first step is compared with one by hand."""

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_at)(params)
        updates, opt_state = update(params, opt_state, grads)
        return optax.apply_updates(params, updates), opt_state, loss

    expected = by_hand(loss_at, params)
    losses = []
    for index in range(STEPS):
        params, opt_state, loss = step(params, opt_state)
        losses.append(loss)
        if index == 0:
            assert_close(params, expected)
    assert_learns(losses)


def make_params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "hidden": jax.random.normal(keys[0], (4, 16)) / 2,
        "output": jax.random.normal(keys[1], (16, 1)) / 4,
    }


def mlp_loss(params, batch):
    x, y = batch
    return squared_error(jnp.tanh(x @ params["hidden"]) @ params["output"], y)


def parts_of(batch, count=4):
    return jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch)


def test_accumulation_in_the_loss_is_the_update_of_the_whole_batch():
    batch = make_batch()

    def accumulated(params):
        add = jax.checkpoint(lambda sum, part: (sum + mlp_loss(params, part), None))
        return jax.lax.scan(add, 0.0, parts_of(batch))[0] / 4

    optimizer, params = make_optimizer(), make_params()
    descend(
        lambda params, opt_state, grads: optimizer.update(
            grads, opt_state, params, value_fn=accumulated
        ),
        optimizer.init(params),
        params,
        lambda params: mlp_loss(params, batch),
    )


def test_multi_steps_behind_the_rule_averages_the_updates_of_the_parts():
    rest = optax.MultiSteps(optax.sgd(RATE), every_k_schedule=4)
    optimizer = optax.chain(
        cram_plus(mlp_loss, PROJECTOR, RHO), rest.gradient_transformation()
    )
    params, batch = make_params(), make_batch()
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, part):
        loss, grads = jax.value_and_grad(mlp_loss)(params, part)
        updates, opt_state = optimizer.update(grads, opt_state, params, batch=part)
        return optax.apply_updates(params, updates), opt_state, loss

    parts = [jax.tree.map(lambda a, i=i: a[i], parts_of(batch)) for i in range(4)]
    of_parts = [
        direction(functools.partial(mlp_loss, batch=part), params) for part in parts
    ]
    expected = jax.tree.map(lambda p, *u: p - RATE * sum(u) / 4, params, *of_parts)
    losses = []
    for index in range(STEPS):
        for part in parts:
            params, opt_state, loss = step(params, opt_state, part)
            losses.append(loss)
        if index == 0:
            assert_close(params, expected)
    assert_learns(losses)


def test_lookahead():
    lookahead = optax.lookahead(optax.sgd(RATE), sync_period=2, slow_step_size=0.5)
    rule = cram_plus(mlp_loss, PROJECTOR, RHO)
    batch = make_batch()
    params = optax.LookaheadParams.init_synced(make_params())
    state = rule.init(params.fast), lookahead.init(params)

    @jax.jit
    def step(params, state, batch):
        rule_state, opt_state = state
        loss, grads = jax.value_and_grad(mlp_loss)(params.fast, batch)
        grads, rule_state = rule.update(  # new
            grads, rule_state, params.fast, batch=batch
        )
        updates, opt_state = lookahead.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), (rule_state, opt_state), loss

    loss_at = functools.partial(mlp_loss, batch=batch)
    start = params.slow
    ahead = by_hand(loss_at, by_hand(loss_at, start))
    expected = jax.tree.map(lambda p, a: p + 0.5 * (a - p), start, ahead)
    losses = []
    for index in range(STEPS):
        params, state, loss = step(params, state, batch)
        losses.append(loss)
        if index == 1:
            assert_close(params, optax.LookaheadParams(expected, expected))
    assert_learns(losses)


def test_a_line_search_behind_the_rule_gets_the_same_loss():
    batch = make_batch()
    optimizer = optax.chain(
        cram_plus(None, PROJECTOR, RHO),
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),
    )
    params = make_params()
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(mlp_loss)(params, batch)
        updates, opt_state = optimizer.update(
            grads,
            opt_state,
            params,
            value=loss,
            grad=grads,
            value_fn=mlp_loss,
            batch=batch,
        )
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _ in range(STEPS):
        params, opt_state, loss = step(params, opt_state, batch)
        losses.append(loss)
    assert_learns(losses)
