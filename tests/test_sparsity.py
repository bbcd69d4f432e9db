"""How many weights stay, exactly."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cram_jax.sparsity import kept_count


@pytest.mark.parametrize(
    ("size", "sparsity", "kept"),
    [
        (100, 0.29, 71),  # 0.29 * 100 is 28.999999999999996 in floating point
        (100, 0, 100),
        (1, 0.999, 1),
        (3, 1 - 1 / 3, 1),  # 0.6666666666666667
        (49, 1 / 49, 48),  # 0.02040816326530612, times 49 below 1
        (10**8, 0.9, 10**7),
        (10**8 + 7, 0.9, 10**7 + 1),
        (10**8, np.float32(0.9), 10**7),
        (7, 1 - 2**-53, 1),
        (70 * 10**9, 0.95, 35 * 10**8),
    ],
)
def test_the_count_is_exact(size, sparsity, kept):
    assert kept_count(size, sparsity) == kept


traced_count = jax.jit(kept_count, static_argnums=0)


# Few sizes, because each compiles.
@given(
    st.sampled_from([1, 999, 25_557_032, 1_234_567_891, 2 * 10**9]),
    st.integers(0, 10**7 - 1),
)
def test_a_traced_sparsity_counts_like_its_decimal(size, tens_of_millions):
    sparsity = Fraction(tens_of_millions, 10**7)
    traced = traced_count(size, jnp.float32(float(sparsity)))
    # Seven decimals survive float32, so not one entry may be lost.
    assert int(traced) == size - int(sparsity * size)


def test_a_traced_sparsity_of_more_weights_than_int32_counts():
    with pytest.raises(ValueError, match="3000000000 weights needs 64-bit integers"):
        traced_count(3 * 10**9, jnp.float32(0.9))
    with jax.enable_x64(True):
        for size in (3 * 10**9, 30 * 10**9):  # as a schedule gives it
            assert int(traced_count(size, jnp.float32(0.9))) == size // 10


def test_a_traced_float64_sparsity_is_exact():
    with jax.enable_x64(True):
        for size, sparsity in [(100, 0.29), (49, 1 / 49), (10**10, 0.123456789)]:
            traced = jax.jit(lambda s, n=size: kept_count(n, s))(jnp.float64(sparsity))
            assert int(traced) == kept_count(size, sparsity)
