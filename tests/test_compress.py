import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import strategies
from hypothesis import given

from cram_jax import compress, keep_pruned, one_of, top_k


@jax.jit
def prune_and_train(params, sparsity):
    pruned, masks = compress(params, top_k(sparsity))
    optimizer = optax.chain(
        optax.add_decayed_weights(0.1), optax.adam(0.1), keep_pruned(masks)
    )
    state = optimizer.init(pruned)
    for _ in range(2):
        grads = jax.tree.map(jnp.ones_like, pruned)
        updates, state = optimizer.update(grads, state, pruned)
        pruned = optax.apply_updates(pruned, updates)
    return pruned, masks


@given(strategies.trees(strategies.FEW_LAYOUTS), strategies.sparsities())
def test_pruned_weights_stay_exactly_zero(params, sparsity):
    pruned, masks = prune_and_train(params, sparsity)
    for leaf, mask in zip(*map(jax.tree.leaves, (pruned, masks)), strict=True):
        assert (np.asarray(leaf)[~np.asarray(mask)] == 0).all()


def test_kept_weights_train_as_without_it():
    params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
    pruned, masks = compress(params, top_k(0.5))
    grads = {"w": jnp.array([[0.1, 0.2], [0.3, 0.4]])}
    plain = optax.sgd(0.5)
    optimizer = optax.chain(plain, keep_pruned(masks))
    expected, _ = plain.update(grads, plain.init(pruned), pruned)
    updates, _ = optimizer.update(grads, optimizer.init(pruned), pruned)
    np.testing.assert_array_equal(updates["w"], jnp.where(masks["w"], expected["w"], 0))


def test_the_first_step_prunes_parameters_that_were_not():
    params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
    masks = compress(params, top_k(0.5)).masks
    optimizer = optax.chain(optax.sgd(0.5), keep_pruned(masks))
    grads = {"w": jnp.ones((2, 2))}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_array_equal(
        optax.apply_updates(params, updates)["w"], [[0.0, -2.5], [2.5, 0.0]]
    )


def test_the_masks_live_in_the_state_and_survive_donation():
    params = {"w": jnp.ones((4, 4))}
    masks = compress(params, top_k(0.5)).masks
    transformation = keep_pruned(masks)
    state = transformation.init(params)
    chex.assert_trees_all_equal(state.masks, masks)
    update = jax.jit(transformation.update, donate_argnums=1)
    for _ in range(2):
        update(params, transformation.init(params), params)
    lowered = jax.jit(transformation.update).lower(params, state, params).as_text()
    assert "dense<" not in lowered.replace("dense<0.000000e+00>", "")


def test_without_masks_the_zeros_of_the_chosen_leaves_stay():
    params = {"w": jnp.array([[0.0, -2.0], [3.0, 0.0]]), "bias": jnp.zeros(2)}
    updates = jax.tree.map(jnp.ones_like, params)

    def after(**options):
        rule = keep_pruned(**options)
        held, _ = jax.jit(rule.update)(updates, rule.init(params), params)
        return optax.apply_updates(params, held)

    weights = jnp.array([[0.0, -1.0], [4.0, 0.0]])
    chex.assert_trees_all_equal(after(), {"w": weights, "bias": jnp.ones(2)})
    chex.assert_trees_all_equal(
        after(where=lambda path, leaf: path == "bias"),
        {"w": params["w"] + 1, "bias": jnp.zeros(2)},
    )


@pytest.mark.parametrize(
    ("updates_dtype", "params_dtype"),
    [("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "bfloat16")],
)
def test_pruned_weights_are_zero_whatever_the_dtypes(updates_dtype, params_dtype):
    """The weights need all the bits of their dtype, and were not pruned before."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(8, 8)), params_dtype)
    updates = jnp.asarray(rng.normal(size=(8, 8)), updates_dtype)
    mask = jnp.asarray(rng.random((8, 8)) < 0.5)
    rule = keep_pruned(mask)
    held, _ = rule.update(updates, rule.init(params), params)
    expected = jnp.where(mask, optax.apply_updates(params, updates), 0)
    np.testing.assert_array_equal(optax.apply_updates(params, held), expected)


def test_strict_promotion_and_arrays_of_numpy_are_no_obstacle():
    params = [np.array([[2.0, 0.0]])]
    optimizer = keep_pruned()
    state = optimizer.init(params)
    narrow = [jnp.ones((1, 2), jnp.bfloat16)]
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = optimizer.update(narrow, state, params)
    np.testing.assert_array_equal(updates[0], [[1.0, 0.0]])
    assert updates[0].dtype == jnp.float32


def test_optax_maps_over_the_masks():
    params = {"w": jnp.array([[0.0, 2.0]]), "bias": jnp.zeros(1)}
    for rule in (keep_pruned(), keep_pruned(compress(params, top_k(0.5)).masks)):
        state = rule.init(params)
        mapped = optax.tree.map_params(rule, lambda mask, p: (mask, p), state, params)
        assert mapped.masks["w"] == (state.masks["w"], params["w"])


def test_masks_that_do_not_fit_are_refused():
    params = {"w": jnp.ones((4, 4))}
    with pytest.raises(TypeError, match=r"masks\['w'\] must be bool, got float32"):
        keep_pruned(params)
    with pytest.raises(ValueError, match="masks must have the structure of params"):
        keep_pruned({"v": jnp.ones((4, 4), bool)}).init(params)
    with pytest.raises(
        ValueError, match=r"masks\['w'\] must have the shape .* \(4, 4\)"
    ):
        keep_pruned({"w": jnp.ones(4, bool)}).init(params)
    with pytest.raises(ValueError, match="where says whose zeros .* got both"):
        keep_pruned({"w": jnp.ones((4, 4), bool)}, where=lambda path, leaf: True)
    transformation = keep_pruned({"w": jnp.ones((4, 4), bool)})
    with pytest.raises(ValueError, match="keep_pruned needs params"):
        transformation.update(params, transformation.init(params))


def test_compress_refuses_what_is_no_projector():
    with pytest.raises(TypeError, match="projector must be a Projector, got 0.9"):
        compress({"w": jnp.ones((2, 2))}, 0.9)


def test_leaves_left_alone_are_not_copied():
    params = {"w": jnp.arange(4.0).reshape(2, 2), "bias": jnp.ones(2)}
    assert compress(params, top_k(0.5)).params["bias"] is params["bias"]


def test_compress_draws_with_the_key_it_is_given():
    params = {"w": jnp.arange(16.0).reshape(4, 4)}
    projector = one_of(top_k(0.25), top_k(0.75))

    @jax.jit
    def count(seed):
        return compress(params, projector, key=jax.random.key(seed)).masks["w"].sum()

    kept = [int(count(seed)) for seed in range(8)]
    assert set(kept) == {12, 4}
    for key in (3, np.int32(3), jax.random.PRNGKey(3)):
        assert compress(params, projector, key=key).masks["w"].sum() == kept[3]
    with pytest.raises(TypeError, match="key must be a PRNG key or an integer seed"):
        compress(params, projector, key="3")
