"""Training under masks, beside float64 NumPy that follows the papers' own order."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from flax import nnx, serialization
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from least_squares import START, gradient, loss_fn

from cram_jax import (
    MaskRule,
    compose,
    cram_plus,
    fake_quant,
    keep_pruned,
    n_m,
    pruned,
    renew_by,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE, MOMENTUM, DECAY = 0.05, 0.9, 0.01


def sgd():
    return optax.chain(
        optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM)
    )


def train(optimizer, steps, params=None, state=None):
    """All parameters on the way, and the last state."""

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


def largest(kernel, sparsity):
    size = kernel.size
    return references.keep_largest([kernel], size - int(np.floor(sparsity * size)))[0]


def ac_dc_by_hand(steps, phase, sparsity):
    """Masks at the start of compressed phases, all momentum zero at that of others."""
    params = {name: value.copy() for name, value in START.items()}
    momentum = {name: np.zeros_like(value) for name, value in START.items()}
    mask, way = np.ones_like(START["kernel"]), []
    for step in range(steps):
        if step % phase == 0:
            if step // phase % 2:
                mask = largest(params["kernel"], sparsity)
            else:
                mask = np.ones_like(mask)
                momentum = {name: np.zeros_like(m) for name, m in momentum.items()}
            params["kernel"] = params["kernel"] * mask
        grads = gradient(params)
        grads["kernel"] = grads["kernel"] * mask
        for name in params:
            decayed = grads[name] + DECAY * params[name]
            momentum[name] = MOMENTUM * momentum[name] + decayed
            params[name] = params[name] - RATE * momentum[name]
        params["kernel"] = params["kernel"] * mask
        way.append({name: value.copy() for name, value in params.items()})
    return way


def square_wave(phase, sparsity):
    return lambda count: jnp.where(count // phase % 2 == 1, sparsity, 0.0)


def test_ac_dc_is_that_of_the_paper():
    """Five phases; at a phase's end ours is pruned one step earlier than theirs."""
    phase = 4
    with jax.enable_x64(True):
        rule = renew_by(top_k, square_wave(phase, 0.75))
        way, _ = train(pruned(sgd(), rule, every=phase, restart="all"), 5 * phase - 1)
    for step, (ours, theirs) in enumerate(
        zip(way, ac_dc_by_hand(5 * phase - 1, phase, 0.75), strict=True)
    ):
        if (step + 1) % phase == 0:
            theirs["kernel"] *= np.asarray(ours["kernel"]) != 0
        chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_cubic_prunes_for_good_at_its_pace():
    """Zhu and Gupta: s_f - s_f (1 - t / T)^3, every second step."""
    final, length = 0.75, 8
    rule = renew_by(top_k, optax.polynomial_schedule(0.0, final, 3, length))
    way, _ = train(pruned(sgd(), rule, every=2, restart=None), 12)
    gone = np.zeros((4, 3), bool)
    for count, params in enumerate(way, 1):
        t = min(count - count % 2, length)
        sparsity = final - final * (1 - t / length) ** 3
        zeros = np.asarray(params["kernel"]) == 0
        assert zeros.sum() == int(np.floor(sparsity * 12 + 1e-6))
        assert zeros[gone].all()
        assert np.all(params["bias"] != 0)
        gone = zeros


def test_without_hold_it_is_iterative_hard_thresholding():
    """Blumensath and Davies: the largest of a gradient step, at every step."""
    with jax.enable_x64(True):
        rule = renew_by(top_k, lambda count: 0.5)
        way, _ = train(pruned(optax.sgd(RATE), rule, hold=False), 6)
    params = {name: value.copy() for name, value in START.items()}
    for ours in way:
        grads = gradient(params)
        params = {name: params[name] - RATE * grads[name] for name in params}
        params["kernel"] *= largest(params["kernel"], 0.5)
        chex.assert_trees_all_close(ours, params, rtol=1e-12, atol=1e-12)


def test_without_hold_weights_train_between_renewals():
    rule = renew_by(top_k, lambda count: 0.5)
    way, _ = train(pruned(sgd(), rule, every=3, hold=False), 6)
    zeros = [int((params["kernel"] == 0).sum()) for params in way]
    assert zeros == [0, 0, 6, 0, 0, 6]


def alternating(params, key):
    """Column 0 is pruned, then column 1, and so on."""
    del key
    masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), params)
    if jax.tree.leaves(params):
        masks["kernel"] = masks["kernel"].at[:, 0].set(False)
    return masks, ()


def other_column(masks, state, step):
    kernel = jnp.roll(masks["kernel"], 1, axis=1)
    return masks | {"kernel": kernel}, state


ALTERNATING = MaskRule(alternating, other_column)


@pytest.mark.parametrize("restart", ["new", "all", None])
def test_the_state_of_revived_weights_restarts(restart):
    inner = optax.chain(optax.scale_by_adam(), optax.scale(-RATE))
    optimizer = pruned(inner, ALTERNATING, every=3, restart=restart)
    way, before = train(optimizer, 2)
    _, after = train(optimizer, 1, way[-1], before)
    adam = after.inner_state[0]
    assert int(adam.count) == 3
    # Column 0 came back. The moments of the others are those of the plain optimiser.
    masked = jax.grad(loss_fn)(way[-1])
    masked["kernel"] = masked["kernel"].at[:, 0].set(0)
    _, plain = inner.update(masked, before.inner_state, way[-1])
    for name in ("mu", "nu"):
        ours, expected = getattr(adam, name), getattr(plain[0], name)
        if restart == "all":
            expected = jax.tree.map(jnp.zeros_like, expected)
        if restart == "new":
            expected["kernel"] = expected["kernel"].at[:, 0].set(0)
        chex.assert_trees_all_close(ours, expected, rtol=1e-6)


def test_masks_of_another_transformation_do_not_restart():
    """Only floating state is momentum: `keep_pruned` inside keeps its masks."""
    inner = optax.chain(optax.sgd(RATE), keep_pruned(alternating(START, None)[0]))
    _, state = train(pruned(inner, ALTERNATING, every=2), 4)
    assert not state.inner_state[1].masks["kernel"][:, 0].any()


def test_the_rule_inside_gets_its_arguments_and_a_masked_gradient():
    def loss(params, scale):
        return scale * loss_fn(params)

    inner = optax.chain(cram_plus(loss, fake_quant(4), 0.0), optax.sgd(RATE))
    optimizer = pruned(inner, ALTERNATING)
    params = jax.tree.map(jnp.asarray, START)
    state = optimizer.init(params)
    grads = jax.grad(loss)(params, 2.0)
    updates, _ = optimizer.update(grads, state, params, scale=2.0)
    seen = grads | {"kernel": grads["kernel"].at[:, 0].set(0)}
    expected, _ = inner.update(seen, state.inner_state, params, scale=2.0)
    expected["kernel"] = expected["kernel"].at[:, :2].set(-params["kernel"][:, :2])
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_rule_sees_every_gradient_and_gets_a_new_key_each_time(seed):
    """Of five updates, two of which renew the masks."""

    def init(params, key):
        masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
        nothing = {"watched": jnp.zeros(5), "keys": jnp.zeros((5, 2), jnp.uint32)}
        return masks, nothing | {"seen": jnp.zeros(5)}

    def watch(state, step):
        place = step.count - 1
        return state | {
            "watched": state["watched"].at[place].set(step.gradients["kernel"].sum()),
            "keys": state["keys"].at[place].set(jax.random.key_data(step.key)),
        }

    def renew(masks, state, step):
        seen = jnp.count_nonzero(state["watched"])
        state = state | {"seen": state["seen"].at[step.count - 1].set(seen)}
        return jax.tree.map(lambda m: m.at[..., 0].set(False), masks), state

    def run(key):
        rule = MaskRule(init, renew, watch)
        return train(pruned(sgd(), rule, every=2, key=key), 5)

    way, state = run(seed)
    kernels = [gradient(params)["kernel"].sum() for params in [START, *way[:-1]]]
    np.testing.assert_allclose(state.rule_state["watched"], kernels, rtol=1e-5)
    np.testing.assert_array_equal(state.rule_state["seen"], [0, 2, 0, 4, 0])
    keys = np.asarray(state.rule_state["keys"])
    assert len(np.unique(keys, axis=0)) == 5
    _, same = run(jax.random.key(seed))
    np.testing.assert_array_equal(same.rule_state["keys"], keys)
    _, other = run(seed + 1)
    assert not (np.asarray(other.rule_state["keys"]) == keys).all(axis=1).any()


def test_structured_masks_rest_where_the_schedule_is_zero():
    rule = renew_by(lambda share: n_m(2, 4), square_wave(1, 0.5))
    way, _ = train(pruned(sgd(), rule), 3)
    assert [int((params["kernel"] == 0).sum()) for params in way] == [6, 6, 6]
    masks, _ = rule.init(jax.tree.map(jnp.asarray, START), jax.random.key(0))
    assert masks["kernel"].all()


def test_narrow_parameters_reach_exactly_zero():
    params = {"kernel": jnp.array([[0.3, 1.7]], jnp.bfloat16)}
    optimizer = pruned(optax.sgd(0.1), renew_by(top_k, lambda count: 0.5))
    grads = {"kernel": jnp.array([[0.123, -0.077]], jnp.float32)}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert optax.apply_updates(params, updates)["kernel"][0, 0] == 0


def test_a_run_that_is_stored_in_the_middle_of_masks_goes_on_bit_for_bit():
    rule = renew_by(top_k, square_wave(4, 0.75))
    optimizer = pruned(sgd(), rule, every=4, restart="all")
    way, _ = train(optimizer, 14)
    part, state = train(optimizer, 6)
    stored = serialization.to_bytes((part[-1], state))
    like = way[0], optimizer.init(way[0])
    params, state = serialization.from_bytes(like, stored)
    rest, _ = train(optimizer, 8, params, state)
    chex.assert_trees_all_equal(rest[-1], way[-1])


def test_its_state_names_its_parameters():
    """As optax's own states do, for those who shard or count them."""
    optimizer = pruned(optax.adam(0.1), renew_by(top_k, lambda count: 0.5))
    state = optimizer.init(jax.tree.map(jnp.asarray, START))
    named = optax.tree.map_params(optimizer, lambda leaf: "like a parameter", state)
    found = [leaf for leaf in jax.tree.leaves(named) if isinstance(leaf, str)]
    assert len(found) == 3 * 2  # masks and two moments, of two parameters


def test_it_trains_the_modules_of_flax():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    rule = renew_by(top_k, lambda count: 0.5)
    optimizer = nnx.Optimizer(model, pruned(sgd(), rule), wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 4)))))(model)
    optimizer.update(model, grads)
    assert int((model.kernel[...] == 0).sum()) == 6


@pytest.mark.several_devices
@pytest.mark.parametrize("spec", [P("d"), P(None, "d")], ids=["rows", "columns"])
def test_sharded_training_equals_unsharded(spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    key = jax.random.key(0)
    params = {"kernel": jax.random.normal(key, (16, 8)), "bias": jnp.zeros(8)}
    x = jax.random.normal(jax.random.key(1), (8, 16))

    def run(params):
        rule = renew_by(top_k, square_wave(2, 0.75))
        optimizer = pruned(optax.adam(0.1), rule, every=2)

        @jax.jit
        def advance(params, state):
            def loss(params):
                return jnp.sum((x @ params["kernel"] + params["bias"] - 1) ** 2)

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for _ in range(5):
            params, state = advance(params, state)
        return params, state.masks

    placed = {
        "kernel": jax.device_put(params["kernel"], NamedSharding(mesh, spec)),
        "bias": jax.device_put(params["bias"], NamedSharding(mesh, P())),
    }
    (ours, masks), (expected, whole) = run(placed), run(params)
    chex.assert_trees_all_equal(masks, whole)
    # Sums over devices round otherwise.
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_what_it_cannot_do_is_said_early():
    params = jax.tree.map(jnp.asarray, START)
    rule = renew_by(top_k, lambda count: 0.5)
    with pytest.raises(TypeError, match="rule must be a MaskRule, got top_k"):
        pruned(sgd(), top_k(0.5))
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        pruned(sgd(), rule, every=0)
    with pytest.raises(ValueError, match="restart must be 'new' or 'all', got 'old'"):
        pruned(sgd(), rule, restart="old")
    with pytest.raises(TypeError, match="hold must be True or False, got 1"):
        pruned(sgd(), rule, hold=1)
    with pytest.raises(TypeError, match="make must be a function, got 0.5"):
        renew_by(0.5, lambda count: 0.5)
    with pytest.raises(TypeError, match=r"make\(...\) must be a Projector, got None"):
        pruned(sgd(), renew_by(lambda share: None, lambda count: 0.5)).init(params)
    rounding = renew_by(lambda share: compose(top_k(0.5), fake_quant(2)), lambda c: 1)
    with pytest.raises(ValueError, match=r"make\(...\) must only set entries to zero"):
        pruned(sgd(), rounding).init(params)
    wide = {"kernel": jnp.ones((128, 128))}
    factored = optax.adafactor(0.1)
    with pytest.raises(ValueError, match='restart="new" needs an optimiser whose'):
        pruned(factored, rule).init(wide)
    pruned(factored, rule, restart="all").init(wide)
    scalars = MaskRule(lambda params, key: (jax.tree.map(jnp.sum, params), ()), None)
    with pytest.raises(ValueError, match=r"rule.init\['.*'\] must have the shape"):
        pruned(sgd(), scalars).init(params)
    floats = MaskRule(lambda params, key: (params, ()), None)
    with pytest.raises(TypeError, match=r"rule.init\['.*'\] must be bool, got"):
        pruned(sgd(), floats).init(params)
    optimizer = pruned(sgd(), rule)
    with pytest.raises(ValueError, match="pruned needs params"):
        optimizer.update(params, optimizer.init(params))
