"""Every form of a mask comes back, and none is longer than it has to be."""

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cram_jax.export import masks


@hypothesis.settings(max_examples=100)
@given(hnp.arrays(bool, st.integers(0, 300)))
def test_a_mask_comes_back(mask):
    form, content = masks.encode(mask)
    again = masks.decode(form, content, len(mask), int(mask.sum()))
    np.testing.assert_array_equal(again, mask)
    assert len(content) <= -(-len(mask) // 8)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0])
def test_random_zeros_take_little_more_than_their_entropy(sparsity):
    entries = 100_000
    mask = np.random.default_rng(0).random(entries) >= sparsity
    form, content = masks.encode(mask)
    kept = float(mask.mean())
    shares = np.array([kept, 1 - kept])
    entropy = -np.sum(shares * np.log2(np.where(shares > 0, shares, 1)))
    assert 8 * len(content) <= max(1.04 * entropy * entries, 0.02 * entries)
    np.testing.assert_array_equal(
        masks.decode(form, content, entries, int(mask.sum())), mask
    )


def test_blocks_take_less_than_their_entries():
    blocks = np.random.default_rng(0).random((60, 64)) < 0.1
    mask = np.repeat(np.repeat(blocks, 4, axis=0), 2, axis=1).reshape(-1)
    form, content = masks.encode(mask)
    assert form == "zlib"
    assert 8 * len(content) < 0.15 * mask.size
    np.testing.assert_array_equal(
        masks.decode(form, content, mask.size, int(mask.sum())), mask
    )


@pytest.mark.parametrize("form", masks.FORMS)
@given(st.binary(max_size=40), st.integers(0, 200), st.integers(0, 200))
def test_foreign_bytes_are_an_error_or_a_mask(form, content, entries, kept):
    content = np.frombuffer(content, np.uint8)
    try:
        mask = masks.decode(form, content, entries, min(kept, entries))
    except ValueError:
        return
    assert mask.shape == (entries,)
    assert mask.sum() == min(kept, entries)


def test_a_small_stream_that_inflates_to_much_is_refused():
    bomb = masks.encode(np.zeros(10**6, bool))
    assert bomb[0] == "gaps"
    import zlib

    content = np.frombuffer(zlib.compress(bytes(10**6)), np.uint8)
    with pytest.raises(ValueError, match="another length"):
        masks.decode("zlib", content, 80, 0)
