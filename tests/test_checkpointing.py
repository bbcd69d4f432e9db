"""The state through Orbax, into any sharding."""

import chex
import equinox
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cram_jax import (
    cached,
    compose,
    compress,
    compressed_sam,
    cram_plus,
    fake_quant,
    keep_pruned,
    n_m,
    one_of,
    pruned,
    pulled,
    renew_by,
    scheduled,
    top_k,
)


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean((hidden @ params["last"]["kernel"] - y) ** 2)


def make_params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "first": {"kernel": jax.random.normal(keys[0], (8, 16)), "bias": jnp.ones(16)},
        "last": {"kernel": jax.random.normal(keys[1], (16, 8))},
    }


def make_optimizer():
    projector = one_of(
        cached(top_k(0.5), every=3), cached(n_m(2, 4), every=2), fake_quant(4)
    )
    return optax.chain(
        cram_plus(loss_fn, projector, 0.1, key=7), optax.sgd(0.1, momentum=0.9)
    )


@jax.jit
def advance(state, step):
    params, opt_state = state
    key = jax.random.fold_in(jax.random.key(1), step)
    x = jax.random.normal(key, (16, 8))
    batch = {"x": x, "y": jnp.cumsum(x, axis=1)}
    grads = jax.grad(loss_fn)(params, **batch)
    updates, opt_state = make_optimizer().update(grads, opt_state, params, **batch)
    return optax.apply_updates(params, updates), opt_state


def train(state, begin, end):
    for step in range(begin, end):
        state = advance(state, step)
    return state


def start():
    params = make_params()
    return params, make_optimizer().init(params)


def through_a_checkpoint(state, like, folder):
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", abstract)


def sharded(state, mesh):
    """Every array on the mesh, along axis 0 where the devices divide it."""

    def put(x):
        divides = x.ndim and x.shape[0] % mesh.size == 0
        return jax.device_put(x, NamedSharding(mesh, P("data") if divides else P()))

    return jax.tree.map(put, state)


def test_a_restored_run_equals_an_uninterrupted_one(tmp_path):
    expected = train(start(), 0, 12)
    half = through_a_checkpoint(train(start(), 0, 5), start(), tmp_path)
    chex.assert_trees_all_equal(train(half, 5, 12), expected)


@pytest.mark.several_devices
def test_a_state_goes_from_one_device_to_a_mesh_and_back(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    expected = train(start(), 0, 9)
    state = train(start(), 0, 3)
    spread = through_a_checkpoint(state, sharded(start(), mesh), tmp_path / "1")
    chex.assert_trees_all_equal(spread, state)
    assert spread[0]["first"]["kernel"].sharding.spec == P("data")
    assert spread[1][0].projector_state[0].bits["last"]["kernel"].sharding.spec == P(
        "data"
    )
    with jax.set_mesh(mesh):
        spread = train(spread, 3, 6)
    single = through_a_checkpoint(spread, start(), tmp_path / "2")
    assert len(single[0]["first"]["kernel"].sharding.device_set) == 1
    # Sums over devices round otherwise.
    actual = train(single, 6, 9)
    chex.assert_trees_all_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(
        actual[1][0].projector_state[0].bits, expected[1][0].projector_state[0].bits
    )


def test_states_are_plain_arrays_that_any_library_writes(tmp_path):
    _, state = train(start(), 0, 2)
    _, like = start()
    restored = serialization.from_bytes(like, serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    equinox.tree_serialise_leaves(tmp_path / "state.eqx", state)
    restored = equinox.tree_deserialise_leaves(tmp_path / "state.eqx", like)
    chex.assert_trees_all_equal(restored, state)


def test_the_masks_of_keep_pruned_come_from_its_state(tmp_path):
    params, masks = compress(make_params(), top_k(0.5))
    others = jax.tree.map(jnp.ones_like, masks)
    saved, rule = keep_pruned(masks).init(params), keep_pruned(others)
    state = through_a_checkpoint(saved, rule.init(params), tmp_path)
    updates, _ = rule.update(jax.tree.map(jnp.ones_like, params), state, params)
    chex.assert_trees_all_equal(jax.tree.map(lambda u: u == 1, updates), masks)


RULES = [
    cram_plus(loss_fn, top_k(0.5)),
    compressed_sam(loss_fn, top_k(0.5)),
    pulled(top_k(0.5), 0.1, every=2),
    pruned(optax.sgd(0.1), renew_by(top_k, lambda count: 0.5)),
    keep_pruned(),
]


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_restored_without_a_target_is_refused(rule):
    """Orbax and `flax.serialization` then return dictionaries."""
    params = make_params()
    state = rule.init(params)
    batch = {"x": jnp.ones((2, 8)), "y": jnp.ones((2, 8))}
    kind = type(state).__name__
    with pytest.raises(TypeError, match=rf"^state must be a {kind}, as .* a dict; "):
        rule.update(params, serialization.to_state_dict(state), params, **batch)


@pytest.mark.parametrize(
    ("projector", "before", "match"),
    [
        (cached(top_k(0.5), every=3), top_k(0.5), "a CachedState, .* got a tuple of 0"),
        (
            cached(scheduled(top_k, lambda uses: 0.5), every=3),
            cached(top_k(0.5), every=3),
            "scheduled.* must be a ScheduledState, .* got a tuple of 0",
        ),
        (
            one_of(top_k(0.5), n_m(2, 4), fake_quant(4)),
            one_of(top_k(0.5), n_m(2, 4)),
            "a tuple of 3 states, .* got a tuple of 2",
        ),
        (compose(top_k(0.5), fake_quant(4)), top_k(0.5), "a tuple of 2 states"),
    ],
)
def test_the_state_of_another_projector_is_refused(projector, before, match):
    params = make_params()
    state = before.init(params)
    with pytest.raises(TypeError, match=rf"^state of .*{match}"):
        projector.project(params, state, jax.random.key(0))
