"""Blocks of weights that are kept or removed together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import strategies
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from cram_jax import compress, sparsity_report, top_k
from cram_jax.blocks import block_scores
from cram_jax.sparsity import kept_count

pytestmark = pytest.mark.usefixtures("quick_compilation")

BLOCKS = ((1, 1), (1, 4), (4, 1), (2, 2), (None, 2), (..., 1), (..., 4), (None, None))

# Not their product with BLOCKS, because each compiles: two blocks have each of them.
KINDS = (
    ("float32", "global"),
    ("bfloat16", "layer"),
    ("float32", "layer"),
    ("bfloat16", "global"),
)


@pytest.mark.parametrize(
    ("block", "dtype", "scope"),
    [(block, *KINDS[i % len(KINDS)]) for i, block in enumerate(BLOCKS)],
)
@given(data=st.data(), sparsity=strategies.sparsities())
def test_blocks_agree_with_float64(block, dtype, scope, data, sparsity):
    shapes = ((8, 12), (3, 3, 4, 8))
    leaves = [data.draw(strategies.arrays(shape, dtype)) for shape in shapes]
    values, masks = compress(leaves, top_k(sparsity, scope=scope, block=block))
    scores = [references.block_rms(leaf, block) for leaf in leaves]
    groups = [scores] if scope == "global" else [[score] for score in scores]
    for score, leaf, mask, value in zip(scores, leaves, masks, values, strict=True):
        np.testing.assert_array_equal(value, np.where(mask, leaf, 0))
        kept = references.block_rms(mask, block)
        assert set(np.unique(kept)) <= {0.0, 1.0}  # whole blocks
        group = scores if scope == "global" else [score]
        k = kept_count(sum(s.size for s in group), sparsity)
        # Float32 may order blocks otherwise whose scores differ by rounding alone.
        threshold = np.sort(np.concatenate([s.ravel() for s in group]))[-k]
        assert (kept[score > threshold * (1 + 1e-5)] == 1).all()
        assert (kept[score < threshold * (1 - 1e-5)] == 0).all()
    for group in groups:
        kept = sum(
            int(references.block_rms(masks[i], block).sum())
            for i, score in enumerate(scores)
            if any(score is member for member in group)
        )
        assert kept == kept_count(sum(score.size for score in group), sparsity)


@given(strategies.trees(), strategies.sparsities())
def test_blocks_of_one_weight_are_single_weights(params, sparsity):
    blocked = compress(params, top_k(sparsity, block=(1, 1)))
    single = compress(params, top_k(sparsity))
    jax.tree.map(np.testing.assert_array_equal, blocked, single)


@pytest.mark.parametrize("magnitude", [1e-37, 1e-25, 1e-12, 1e18, 1e36])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_any_magnitude_are_compared(magnitude, dtype):
    kernel = jnp.asarray([[1, 2], [4, 3], [0, 0]], dtype) * magnitude
    other = jnp.asarray([[2, 2], [1, 16]], dtype) * magnitude
    _, masks = compress([kernel, other], top_k(0.6, block=(1, 2)))
    np.testing.assert_array_equal(masks[0], np.array([[0, 0], [1, 1], [0, 0]], bool))
    np.testing.assert_array_equal(masks[1], np.array([[0, 0], [1, 1]], bool))
    (single,) = compress([kernel], top_k(0.5, block=(1, 1))).masks
    expected = np.array([[0, 1], [1, 1], [0, 0]], bool)
    np.testing.assert_array_equal(single, expected)


def test_scores_of_ordinary_blocks_are_those_without_a_unit():
    kernel = jax.random.normal(jax.random.key(0), (8, 12))
    scores = jax.jit(block_scores, static_argnums=1)(kernel, (2, 3))
    squares = jnp.sum(kernel.reshape(4, 2, 4, 3) ** 2, axis=(1, 3))
    np.testing.assert_array_equal(scores, jnp.sqrt(squares / 2 / 3))


def test_infinite_blocks_and_nan_stay():
    kernel = jnp.array([[1.0, jnp.inf], [1e30, 2.0], [jnp.nan, 0.0]])
    _, (mask,) = compress([kernel], top_k(0.3, block=(1, 2)))
    assert mask[:, 0].tolist() == [True, True, True]
    _, (mask,) = compress([kernel], top_k(0.4, block=(1, 2)))
    assert mask[:, 0].tolist() == [True, False, True]


@given(
    strategies.arrays((8, 12)), strategies.sparsities(), st.sampled_from(BLOCKS[:-1])
)
def test_blocks_twice_are_blocks_once(kernel, sparsity, block):
    projector = top_k(sparsity, block=block)
    once = compress([kernel], projector)
    jax.tree.map(np.testing.assert_array_equal, once, compress(once.params, projector))


def test_output_channels_of_dense_layers_and_convolutions_compete():
    params = {
        "conv": jnp.full((3, 3, 2, 2), jnp.array([0.1, 3.0])),
        "dense": jnp.full((4, 3), jnp.array([1.0, 2.0, 0.5])),
    }
    masks = compress(params, top_k(0.4, block=(..., 1))).masks
    expected = {
        "conv": jnp.broadcast_to(jnp.array([False, True]), (3, 3, 2, 2)),
        "dense": jnp.broadcast_to(jnp.array([True, True, False]), (4, 3)),
    }
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


def test_a_removed_head_changes_nothing_but_its_own_output():
    attention = nnx.MultiHeadAttention(4, 16, rngs=nnx.Rngs(0), decode=False)
    graph, params = nnx.split(attention, nnx.Param)
    params = nnx.as_pure(params)
    params["out"]["kernel"] = params["out"]["kernel"].at[2].multiply(0.01)
    pruned, masks = compress(
        params,
        top_k(0.25, block=(4, None), where=lambda path, _: path == "out/kernel"),
    )
    kept = jnp.any(masks["out"]["kernel"], axis=(1, 2))
    np.testing.assert_array_equal(kept, [True, True, False, True])

    def without(head):  # the same heads, with the removed one cut out of every kernel
        small = nnx.MultiHeadAttention(
            3, 16, qkv_features=12, rngs=nnx.Rngs(0), decode=False
        )
        small_graph, small_params = nnx.split(small, nnx.Param)
        cut = nnx.as_pure(small_params)
        for name in ("query", "key", "value"):
            cut[name]["kernel"] = jnp.delete(params[name]["kernel"], head, axis=1)
            cut[name]["bias"] = jnp.delete(params[name]["bias"], head, axis=0)
        cut["out"]["kernel"] = jnp.delete(params["out"]["kernel"], head, axis=0)
        cut["out"]["bias"] = params["out"]["bias"]
        return nnx.merge(small_graph, cut)

    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    np.testing.assert_allclose(
        nnx.jit(lambda model: model(x))(nnx.merge(graph, pruned)),
        nnx.jit(lambda model: model(x))(without(2)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_leaf_that_the_block_does_not_divide_stays_dense_and_is_reported():
    params = {"even": jnp.ones((4, 8)), "odd": jnp.ones((4, 6)), "flat": jnp.ones(8)}
    projector = top_k(0.5, block=(1, 4))
    masks = compress(params, projector).masks
    assert not masks["even"].all()
    assert masks["odd"].all()
    report = sparsity_report(*compress(params, projector), projector)
    assert [leaf.note for leaf in report.leaves] == [
        "assumed to be Axes('input', 'output')",
        "dense: fewer than 2 dimensions",
        "dense: 4 does not divide its 6 outputs",
    ]


@given(strategies.arrays((5, 7)), strategies.sparsities())
def test_blocks_at_the_edge_are_scored_by_what_is_there(kernel, sparsity):
    (values,), (masks,) = compress([kernel], top_k(sparsity, block=(4, 2), pad=True))
    filled = np.full((8, 8), np.nan)
    filled[:5, :7] = np.asarray(kernel, np.float64)
    blocks = filled.reshape(2, 4, 4, 2)
    scores = np.sqrt(np.nanmean(blocks**2, axis=(1, 3)))
    k = kept_count(8, sparsity)
    kept = np.asarray(masks)
    np.testing.assert_array_equal(values, np.where(kept, kernel, 0))
    whole = np.pad(kept, ((0, 3), (0, 1)), mode="edge").reshape(2, 4, 4, 2)
    assert (whole == whole[:, :1, :, :1]).all()
    whole = whole[:, 0, :, 0]
    assert whole.sum() == k
    threshold = np.sort(scores.ravel())[-k]
    assert whole[scores > threshold * (1 + 1e-5)].all()
    assert not whole[scores < threshold * (1 - 1e-5)].any()


def test_a_block_that_divides_nothing_is_refused_at_init():
    with pytest.raises(ValueError, match="5 does not divide its 8 outputs"):
        top_k(0.5, block=(1, 5)).init([jnp.ones((4, 8))])


def test_a_block_of_more_axes_than_the_leaf_is_refused_at_init():
    with pytest.raises(ValueError, match="fewer than 3 axes"):
        top_k(0.5, block=(1, 1, 4)).init([jnp.ones((4, 8))])


@pytest.mark.parametrize(
    "block", [(), (...,), (0, 4), (1, -2), (1.0, 4), (True, 4), 4, [1, 4], (1, ...)]
)
def test_wrong_blocks_are_refused(block):
    with pytest.raises(ValueError, match="block must be a tuple of integers"):
        top_k(0.5, block=block)


def test_the_label_names_the_options():
    projector = top_k(0.5, scope="layer", block=(..., 1))
    assert repr(projector) == "top_k(0.5, scope='layer', block=(..., 1))"
