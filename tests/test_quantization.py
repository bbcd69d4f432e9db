import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import strategies
from hypothesis import given
from hypothesis import strategies as st

from cram_jax import compress, fake_quant

BITS = st.integers(2, 8)


@given(st.sampled_from(strategies.SHAPES).flatmap(strategies.arrays), BITS)
def test_fake_quant_agrees_with_float64(kernel, bits):
    (rounded,) = compress([kernel], fake_quant(bits)).params
    expected = references.fake_quant(kernel, bits)
    level = np.abs(np.asarray(kernel, np.float64)).max(
        axis=tuple(range(kernel.ndim - 1))
    ) / (2 ** (bits - 1) - 1)
    difference = np.abs(np.asarray(rounded, np.float64) - expected)
    # Where the ratio is a half, float32 may round to the other side: one level.
    ratio = np.abs(np.asarray(kernel, np.float64)) / np.where(level == 0, 1, level)
    is_half = np.abs(ratio % 1 - 0.5) < 1e-4
    assert (difference <= np.where(is_half, 1.001, 1e-4) * level).all()


@given(strategies.trees(), BITS)
def test_fake_quant_has_few_levels_in_a_channel(params, bits):
    projection = compress(params, fake_quant(bits))
    np.testing.assert_array_equal(projection.params["bias"], params["bias"])
    for leaf, mask in zip(*map(jax.tree.leaves, projection), strict=True):
        assert mask.all()
        if leaf.ndim >= 2:
            for channel in np.moveaxis(np.asarray(leaf), -1, 0):
                assert len(np.unique(channel)) <= 2**bits - 1


@given(strategies.trees(), BITS)
def test_fake_quant_is_symmetric_and_keeps_zeros(params, bits):
    rounded = compress(params, fake_quant(bits)).params
    opposite = compress(jax.tree.map(jnp.negative, params), fake_quant(bits)).params
    for before, after, other in zip(
        *map(jax.tree.leaves, (params, rounded, opposite)), strict=True
    ):
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, -other)
        assert (np.asarray(after)[np.asarray(before) == 0] == 0).all()


@given(strategies.trees(), BITS)
def test_fake_quant_twice_is_fake_quant_once(params, bits):
    once = compress(params, fake_quant(bits)).params
    twice = compress(once, fake_quant(bits)).params
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        # The second scale is the rounded product of the first: some units in the last
        # place of the dtype, never another level.
        epsilon = float(jnp.finfo(a.dtype).eps)
        np.testing.assert_allclose(
            np.float64(b), np.float64(a), rtol=4 * epsilon, atol=0
        )


def test_the_gradient_passes_straight_through():
    kernel = jnp.array([[0.1, 2.0], [-0.7, 0.3]])
    weights = jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def loss(kernel):
        return jnp.sum(weights * compress([kernel], fake_quant(3)).params[0])

    np.testing.assert_array_equal(jax.grad(loss)(kernel), weights)


def test_a_leaf_of_one_dimension_has_one_scale():
    (rounded,) = compress(
        [jnp.array([1.0, 0.4, -3.0])], fake_quant(2, where=lambda path, leaf: True)
    ).params
    np.testing.assert_array_equal(rounded, [0, 0, -3])


@pytest.mark.parametrize("bits", [1, 0, -4, 17])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be between 2 and 16, got {bits}"):
        fake_quant(bits)


@pytest.mark.parametrize("bits", [4.0, "4", True])
def test_bits_must_be_an_integer(bits):
    with pytest.raises(TypeError, match="bits must be an integer, got"):
        fake_quant(bits)


def test_integer_parameters_are_refused():
    with pytest.raises(TypeError, match="'0'.*int32, expected a floating dtype"):
        fake_quant(4).init([jnp.ones((4, 4), jnp.int32)])
