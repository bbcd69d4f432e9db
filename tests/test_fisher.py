"""The inverse Fisher matrix in blocks, against dense float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references import constrained_minimum, dense_fisher

from cram_jax.curvature import fisher

pytestmark = pytest.mark.usefixtures("quick_compilation")

rank_one_update = jax.jit(fisher.rank_one_update)


@pytest.mark.parametrize(
    ("shape", "order", "block_size"),
    [
        ((), (), 1),
        ((1,), (0,), 4),
        ((7,), (0,), 100),
        ((5, 3), (1, 0), 1),
        ((5, 3), (0, 1), 4),
        ((2, 3, 4), (2, 0, 1), 100),
        ((2, 3, 4), (1, 2, 0), 4),
        ((30, 20), (1, 0), 1),
        ((30, 20), (1, 0), 4),
        ((30, 20), (1, 0), 100),
    ],
)
def test_blocks_hold_the_weights_in_order(shape, order, block_size):
    leaf = jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape)
    blocks = fisher.to_blocks(leaf, block_size, order)
    size = np.size(leaf)
    assert blocks.shape[1] == min(block_size, size)
    assert blocks.size - size < blocks.shape[1] * (1 if size < 200 else 128)
    flat = np.transpose(leaf, order).ravel()
    np.testing.assert_array_equal(blocks.ravel()[:size], flat)
    assert (blocks.ravel()[size:] == 0).all()
    np.testing.assert_array_equal(fisher.from_blocks(blocks, leaf, order), leaf)


@given(
    st.sampled_from([1, 2, 5, 13]),
    st.sampled_from([1e-7, 1e-2]),
    st.integers(1, 40),
)
@settings(max_examples=15)
def test_the_inverse_of_a_block_is_that_of_the_dense_matrix(width, damping, count):
    with jax.enable_x64(True):
        gradients = np.random.default_rng(width).normal(size=(count, 2, width))
        root = fisher.damped_root(jnp.zeros((2, width)), damping)
        for gradient in gradients:
            root = rank_one_update(root, jnp.asarray(gradient / np.sqrt(count)))
        for block in range(2):
            dense = dense_fisher(gradients[:, block], damping)
            inverse = np.asarray(root[block] @ root[block].T)
            # Where there are fewer gradients than weights the largest entries are
            # 1 / damping: rounding is relative to those.
            expected = np.linalg.inv(dense)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(inverse, expected, rtol=1e-8, atol=1e-8 * scale)


def test_many_blocks_are_treated_as_one_by_one():
    rng = np.random.default_rng(0)
    weights, removed = rng.normal(size=(256, 5)), rng.random((256, 5)) < 0.5
    gradients = jnp.asarray(rng.normal(size=(256, 4, 5)), jnp.float32)
    root = fisher.damped_root(jnp.zeros((256, 5)), 1e-2)
    together = jax.jit(fisher.rank_one_updates)(root, gradients, 3)
    remove_weights = jax.jit(fisher.remove_weights)
    moved = remove_weights(weights, removed, together)
    for block in (0, 1, 127, 128, 255):
        one = slice(block, block + 1)
        alone = root[one]
        for number in range(3):  # of four
            alone = rank_one_update(alone, gradients[one, number])
        np.testing.assert_allclose(together[one], alone, rtol=1e-5, atol=1e-5)
        expected = remove_weights(weights[one], removed[one], alone)
        np.testing.assert_allclose(moved[one], expected, rtol=1e-4, atol=1e-5)


def test_a_saliency_is_what_the_removal_of_the_weight_costs():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        optimum, gradients = rng.normal(size=7), rng.normal(size=(30, 7))
        hessian = dense_fisher(gradients, 1e-3)
        root = fisher.damped_root(jnp.zeros((1, 7)), 1e-3)
        for gradient in gradients:
            root = rank_one_update(root, jnp.asarray(gradient)[None] / np.sqrt(30))
        saliencies = fisher.saliency_root(root, jnp.asarray(optimum)[None])[0] ** 2
        for place in range(7):
            moved = constrained_minimum(hessian, optimum, np.arange(7) != place)
            increase = (moved - optimum) @ hessian @ (moved - optimum) / 2
            np.testing.assert_allclose(saliencies[place], increase, rtol=1e-8)


def test_single_precision_with_the_smallest_damping_agrees_with_double():
    """Many collinear gradients of size 1 over a damping of 1e-7."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 3)) @ rng.normal(size=(3, 40))
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            root = fisher.damped_root(jnp.zeros((1, 40)), 1e-7)
            for row in x:
                root = rank_one_update(root, jnp.asarray(row)[None] / 10)
            results.append(np.asarray(jnp.sum(root**2, -1)))
    np.testing.assert_allclose(*results, rtol=1e-2)


def test_a_curvature_beyond_all_digits_makes_no_saliency_undefined():
    saliencies = fisher.saliency_root(jnp.zeros((1, 2, 2)), jnp.array([[0.0, 1.0]]))
    assert saliencies[0, 0] == 0
    assert 1e18 < saliencies[0, 1] < jnp.inf
