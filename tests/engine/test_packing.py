"""Sparse weights: which blocks there are, and what the kernels of a set add up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cram_jax import engine
from cram_jax.engine.packing import pack_kernel

LARGE = st.sampled_from([-128, -127, -65, -64, 0, 0, 1, 63, 64, 65, 127])
KERNELS = st.tuples(
    *(st.integers(1, 2), st.integers(1, 2), st.integers(1, 9), st.integers(1, 9))
).flatmap(lambda shape: arrays(np.int8, shape, elements=LARGE))


@pytest.mark.parametrize("name", engine.TARGETS)
@given(kernel=KERNELS)
def test_a_packed_kernel_is_the_kernel(name, kernel):
    scale = np.ones(kernel.shape[-1], np.float32)
    weights = pack_kernel(kernel, engine.TARGETS[name], scale)
    np.testing.assert_array_equal(weights.dense(), kernel)


@given(kernel=KERNELS)
def test_terms_add_up_to_the_kernel_and_their_pairs_fit_into_16_bits(kernel):
    target = engine.TARGETS["avx2"]
    weights = pack_kernel(kernel, target, np.ones(kernel.shape[-1], np.float32))
    terms = weights.terms(target)
    values = terms.words.view(np.int8).reshape(-1, weights.rows, 4).astype(np.int64)

    groups = np.repeat(np.arange(len(weights.occupied)), np.diff(terms.ends))
    total = np.zeros((*weights.occupied.shape, weights.rows, 4), np.int64)
    np.add.at(total, (groups, terms.positions), values)
    expected = np.zeros_like(total)
    expected[weights.occupied] = weights.values
    np.testing.assert_array_equal(total, expected)

    x = np.array([[0, 255, 0, 255], [0, 0, 255, 255]])
    sums = values.reshape(-1, 2) @ x
    assert sums.max(initial=0) < 2**15
    assert sums.min(initial=0) >= -(2**15)
