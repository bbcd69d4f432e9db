"""How far two networks' outputs are from each other."""

import numpy as np
import pytest

from cram_jax.export import ParityError, check_parity


def test_imaginary_parts_count():
    assert check_parity(np.array([3 + 4j]), np.array([3 + 4j]), 0.0) == 0
    with pytest.raises(ParityError, match="differs from JAX by 0.2 of the largest"):
        check_parity(np.array([3 + 3j]), np.array([3 + 4j]), 0.1)


@pytest.mark.parametrize("kind", [list, tuple])
def test_each_of_several_outputs_is_compared_with_its_own_size(kind):
    expected = kind([np.full((2, 2), 1000.0), np.ones(3)])
    got = kind([np.full((2, 2), 1000.0), np.ones(3) + 0.1])
    with pytest.raises(ParityError, match="differs from JAX by 0.1 of the largest"):
        check_parity(got, expected, 0.01)
    assert check_parity(got, expected, 0.11) == pytest.approx(0.1)
