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


@given(strategies.trees(), strategies.sparsities())
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
    transformation = keep_pruned({"w": jnp.ones((4, 4), bool)})
    with pytest.raises(ValueError, match="keep_pruned needs params"):
        transformation.update(params, transformation.init(params))


def test_compress_refuses_what_is_no_projector():
    with pytest.raises(TypeError, match="projector must be a Projector, got 0.9"):
        compress({"w": jnp.ones((2, 2))}, 0.9)


def test_compress_draws_with_the_key_it_is_given():
    params = {"w": jnp.arange(16.0).reshape(4, 4)}
    projector = one_of(top_k(0.25), top_k(0.75))

    @jax.jit
    def count(seed):
        return compress(params, projector, key=jax.random.key(seed)).masks["w"].sum()

    kept = {int(count(seed)) for seed in range(8)}
    assert kept == {12, 4}
