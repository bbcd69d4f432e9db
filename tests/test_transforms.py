"""What the transformations compute, equation by equation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problem import (
    PROJECTORS,
    assert_close,
    loss_fn,
    make_batch,
    make_params,
    run,
)
from watching import Watched

import cram_jax
from cram_jax import (
    compressed_sam,
    cram,
    cram_plus,
    identity,
    sam,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_cram_plus_is_the_dense_gradient_plus_cram():
    params, batch = make_params(), make_batch()
    grads = jax.grad(loss_fn)(params, batch)
    projector = PROJECTORS["one_of"]
    for options in ({}, {"normalize": True, "sparse_gradients": False}):
        one, plus = (
            make(loss_fn, projector, 0.1, key=7, **options)
            for make in (cram, cram_plus)
        )
        inner, state = jax.jit(one.update)(grads, one.init(params), params, batch=batch)
        both, plus_state = jax.jit(plus.update)(
            grads, plus.init(params), params, batch=batch
        )
        chex.assert_trees_all_equal(both, jax.tree.map(jnp.add, grads, inner))
        chex.assert_trees_all_equal(state.compressed_loss, plus_state.compressed_loss)


def test_sam_is_cram_with_the_identity_and_a_normalised_gradient():
    expected = run(cram(loss_fn, identity(), 0.1, normalize=True))[0]
    chex.assert_trees_all_equal(run(sam(loss_fn, 0.1))[0], expected)


def test_sam_agrees_with_optax():
    params, batch = make_params(), make_batch()
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = optax.contrib.sam(optax.sgd(0.1), adversary, opaque_mode=True)
    grads = jax.grad(loss_fn)(params, batch)
    expected, _ = theirs.update(
        grads,
        theirs.init(params),
        params,
        grad_fn=lambda params, _: jax.grad(loss_fn)(params, batch),
    )
    ours = optax.chain(sam(loss_fn, 0.1), optax.sgd(0.1))
    updates, _ = ours.update(grads, ours.init(params), params, batch=batch)
    assert_close(updates, expected)


def test_rho_zero_is_the_gradient_of_the_compressed_model():
    params, batch = make_params(), make_batch()
    (pruned, masks) = cram_jax.compress(params, top_k(0.5))
    transformation = cram(loss_fn, top_k(0.5), rho=0)
    grads = jax.grad(loss_fn)(params, batch)
    updates, state = transformation.update(
        grads, transformation.init(params), params, batch=batch
    )
    inner = jax.grad(loss_fn)(pruned, batch)
    assert_close(updates, jax.tree.map(lambda m, g: jnp.where(m, g, 0), masks, inner))
    assert_close(state.compressed_loss, loss_fn(pruned, batch))


def test_the_ascent_moves_leaves_that_the_projector_leaves_alone():
    params, batch = make_params(), make_batch()
    grads = jax.grad(loss_fn)(params, batch)
    seen = []

    watched = Watched(identity(), lambda tree, key, projection: seen.append(tree))
    transformation = cram(loss_fn, watched, rho=0.5)
    transformation.update(grads, transformation.init(params), params, batch=batch)
    assert_close(seen[-1], jax.tree.map(lambda p, g: p + 0.5 * g, params, grads))


def test_rho_follows_a_schedule_of_the_step_count():
    radii = [0.5, 0.0, 0.2]
    scheduled = run(
        cram_plus(loss_fn, top_k(0.5), lambda count: jnp.array(radii)[count])
    )
    params = make_params()
    for step, rho in enumerate(radii):
        batch = make_batch(step)
        constant = cram_plus(loss_fn, top_k(0.5), rho)
        updates, _ = constant.update(
            jax.grad(loss_fn)(params, batch), constant.init(params), params, batch=batch
        )
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
    assert_close(scheduled[0], params)
    assert int(scheduled[1].count) == 3


@pytest.mark.parametrize("rho", [0.05, 3.0])
def test_a_normalised_ascent_has_length_rho(rho):
    params = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
    seen = []

    watched = Watched(identity(), lambda tree, key, projection: seen.append(tree["w"]))
    transformation = cram(
        lambda params: jnp.sum(params["w"] ** 2),
        watched,
        rho,
        normalize=True,
    )
    transformation.update(params, transformation.init(params), params)
    np.testing.assert_allclose(seen[-1] - params["w"], rho * params["w"] / 5, atol=1e-6)


@pytest.mark.parametrize("make", [cram, cram_plus])
def test_a_zero_gradient_gives_no_ascent_under_normalize(make):
    params = {"w": jnp.full((2, 2), 3.0)}
    rule = make(
        lambda params: jnp.sum(params["w"] ** 2), identity(), 0.1, normalize=True
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = rule.update(zeros, rule.init(params), params)
    chex.assert_trees_all_equal(updates, {"w": jnp.full((2, 2), 6.0)})
    assert state.compressed_loss == 36


def test_a_norm_is_taken_in_float32_for_narrow_types():
    params = {"w": jnp.full((64, 64), 300.0, jnp.float16)}  # 300**2 is inf in float16
    rule = sam(lambda params: jnp.mean(params["w"].astype(jnp.float32)), 64.0)
    updates, state = rule.update(params, rule.init(params), params)
    assert updates["w"].dtype == jnp.float16
    # The norm is 64 * 300, so each of them climbs by 1.
    np.testing.assert_allclose(state.compressed_loss, 301)


def test_compressed_sam_follows_equation_11():
    """By hand, in float64."""
    with jax.enable_x64(True):
        params, batch, rho = make_params(), make_batch(), 0.3
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        compressed, masks = cram_jax.compress(params, top_k(0.5))
        ascent = jax.tree.map(
            lambda m, g: np.where(m, g, 0), masks, jax.grad(loss_fn)(compressed, batch)
        )
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(ascent)))
        perturbed = jax.tree.map(lambda p, a: p + rho * a / norm, params, ascent)
        compressed, masks = cram_jax.compress(perturbed, top_k(0.5))
        loss, inner = jax.value_and_grad(loss_fn)(compressed, batch)
        expected = jax.tree.map(lambda m, g: np.where(m, g, 0), masks, inner)

        rule = compressed_sam(loss_fn, top_k(0.5), rho)
        nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
        updates, state = rule.update(nothing, rule.init(params), params, batch=batch)
        chex.assert_trees_all_close(updates, expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(state.compressed_loss, loss, rtol=1e-10)


def test_compressed_sam_draws_alike_in_both_projections():
    drawn = []

    def listener(params, key, projection):
        drawn.append(jax.random.key_data(key))

    params, batch = make_params(), make_batch()
    rule = compressed_sam(loss_fn, Watched(identity(), listener))
    rule.update(params, rule.init(params), params, batch=batch)
    np.testing.assert_array_equal(*drawn)
