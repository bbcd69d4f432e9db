"""What is counted on a CPU, and what it is on other platforms."""

import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax import counting

# Axes that are cut and that are not, one that is empty, and none.
SHAPES = [(), (0, 3), (7,), (4096,), (3, 3, 8, 128), (64, 37)]


@pytest.mark.parametrize("shape", SHAPES)
def test_true_entries_are_counted(shape):
    masks = [np.random.default_rng(i).random(shape) < i / 3 for i in range(4)]
    expected = [mask.sum() for mask in masks]
    arrays = [jnp.asarray(mask) for mask in masks]
    np.testing.assert_array_equal(counting.count_true(arrays, jnp.int32), expected)
    elsewhere = counting._count_each(arrays, jnp.int32)
    np.testing.assert_array_equal(elsewhere, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_entries_are_numbered_row_by_row(shape):
    expected = np.arange(np.prod(shape, dtype=int)).reshape(shape) - 5
    array, start = jnp.zeros(shape, jnp.bfloat16), jnp.int32(-5)
    np.testing.assert_array_equal(counting.places(array, start), expected)
    elsewhere = counting._places_along_each_axis(start, array)
    np.testing.assert_array_equal(elsewhere, expected)


def test_a_vector_falls_into_its_entries():
    vector = jnp.array([3, -1, 0, 7])
    assert [int(entry) for entry in counting.unstack(vector)] == [3, -1, 0, 7]
