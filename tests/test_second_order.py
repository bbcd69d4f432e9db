"""Second-order pruning against dense float64 linear algebra, within 1e-8."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from cram_jax import compress, fisher, second_order_prune, top_k
from cram_jax.sparsity import kept_count

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


def dense_fisher(gradients, damping):
    """From (m, b) to (b, b)."""
    return damping * np.eye(gradients.shape[1]) + gradients.T @ gradients / len(
        gradients
    )


def flat(leaf):
    """The order in which a leaf is cut into blocks: the outputs outermost."""
    return np.moveaxis(np.asarray(leaf, np.float64), -1, 0).ravel()


def constrained_minimum(hessian, optimum, kept):
    """Where the quadratic around an optimum is least with zeros: by the KKT system."""
    size, removed = len(optimum), np.flatnonzero(~kept)
    constraints = np.eye(size)[removed]
    system = np.block(
        [[hessian, constraints.T], [constraints, np.zeros((len(removed),) * 2)]]
    )
    right = np.concatenate([hessian @ optimum, np.zeros(len(removed))])
    return np.linalg.solve(system, right)[:size]


def linear(params, x):
    """A loss whose gradient for an example is the example, whatever the parameters."""
    return sum(
        jnp.vdot(leaf, rows.mean(0))
        for leaf, rows in zip(jax.tree.leaves(params), jax.tree.leaves(x), strict=True)
    )


def examples_for(params, count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(count, *p.shape))), params)
    }


def small_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "bias": jnp.asarray(rng.normal(size=3)),
        "one": jnp.asarray(rng.normal(size=(5, 3))),
        "two": jnp.asarray(rng.normal(size=(2, 2, 3))),
    }


def blocks_of(size, block_size):
    return [slice(i, min(i + block_size, size)) for i in range(0, size, block_size)]


@given(
    st.integers(1, 13),
    st.sampled_from([1e-7, 1e-2]),
    st.integers(1, 40),
)
@settings(max_examples=15)
def test_the_inverse_of_a_block_is_that_of_the_dense_matrix(width, damping, count):
    with jax.enable_x64(True):
        gradients = np.random.default_rng(width).normal(size=(count, 2, width))
        root = fisher.damped_root(jnp.zeros((2, width)), damping)
        for gradient in gradients:
            root = absorb(root, jnp.asarray(gradient / np.sqrt(count)))
        for block in range(2):
            dense = dense_fisher(gradients[:, block], damping)
            inverse = np.asarray(root[block] @ root[block].T)
            # Where there are fewer gradients than weights the largest entries are
            # 1 / damping: rounding is relative to those.
            expected = np.linalg.inv(dense)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(inverse, expected, rtol=1e-8, atol=1e-8 * scale)


absorb = jax.jit(fisher.absorb)


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.3, 0.5, 0.8]),
    st.sampled_from(["global", "layer"]),
)
@settings(max_examples=8)  # each compiles
def test_a_quadratic_reaches_its_constrained_minimum(
    inputs, outputs, block_size, sparsity, scope
):
    """F is the Hessian of the quadratic that the weights are the minimum of."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(inputs + 10 * outputs)
        params = {
            "a": jnp.asarray(rng.normal(size=(inputs, outputs))),
            "b": jnp.asarray(rng.normal(size=(2, inputs, 3))),
        }
        examples = examples_for(params, 60)
        pruned, masks = second_order_prune(
            linear, params, examples, sparsity, scope=scope,
            block_size=block_size, damping=1e-3,
        )  # fmt: skip
        for name, leaf in params.items():
            optimum, kept = flat(leaf), flat(masks[name]).astype(bool)
            gradients = np.stack([flat(x) for x in examples["x"][name]])
            expected = np.concatenate(
                [
                    constrained_minimum(
                        dense_fisher(gradients[:, block], 1e-3),
                        optimum[block],
                        kept[block],
                    )
                    for block in blocks_of(leaf.size, block_size)
                ]
            )
            np.testing.assert_allclose(flat(pruned[name]), expected, **TOLERANCE)
            assert (flat(pruned[name])[~kept] == 0).all()
        sizes = [leaf.size for leaf in params.values()]
        total = [sum(sizes)] if scope == "global" else sizes
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert kept == sum(kept_count(size, sparsity) for size in total)


def test_a_saliency_is_what_the_removal_of_the_weight_costs():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        optimum, gradients = rng.normal(size=7), rng.normal(size=(30, 7))
        hessian = dense_fisher(gradients, 1e-3)
        root = fisher.damped_root(jnp.zeros((1, 7)), 1e-3)
        for gradient in gradients:
            root = absorb(root, jnp.asarray(gradient)[None] / np.sqrt(30))
        saliencies = fisher.saliency_root(root, jnp.asarray(optimum)[None])[0] ** 2
        for place in range(7):
            moved = constrained_minimum(hessian, optimum, np.arange(7) != place)
            increase = (moved - optimum) @ hessian @ (moved - optimum) / 2
            np.testing.assert_allclose(saliencies[place], increase, **TOLERANCE)


def test_the_weights_with_the_smallest_saliencies_go():
    with jax.enable_x64(True):
        params = {"w": small_params()["one"]}
        examples = examples_for(params, 40)
        masks = second_order_prune(
            linear, params, examples, 0.4, block_size=6, damping=1e-3
        ).masks
        gradients = np.stack([flat(x) for x in examples["x"]["w"]])
        diagonal = np.concatenate(
            [
                np.diag(np.linalg.inv(dense_fisher(gradients[:, block], 1e-3)))
                for block in blocks_of(15, 6)
            ]
        )
        order = np.argsort(flat(params["w"]) ** 2 / (2 * diagonal))
        assert set(order[:6]) == set(np.flatnonzero(flat(masks["w"]) == 0))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("recomputations", [1, 3])
def test_exactly_k_are_kept_of_equal_ones_and_they_are_the_first(scope, recomputations):
    params = {"a": jnp.ones((5, 3)), "b": jnp.ones((2, 3))}
    examples = {"x": jax.tree.map(lambda p: jnp.zeros((4, *p.shape)), params)}
    pruned, masks = second_order_prune(
        linear, params, examples, 0.5, scope=scope,
        recomputations=recomputations, block_size=4,
    )  # fmt: skip
    expected = compress(params, top_k(0.5, scope=scope))
    jax.tree.map(np.testing.assert_array_equal, masks, expected.masks)
    # Without gradients F is a multiple of I, and nothing moves.
    jax.tree.map(np.testing.assert_array_equal, pruned, expected.params)


def test_what_is_pruned_stays_so():
    """Two calls are the steps of one with two recomputations, and F leaves it out."""
    with jax.enable_x64(True):
        params = small_params()
        examples = examples_for(params, 30)
        prune = partial(second_order_prune, linear, examples=examples, block_size=6)
        first = prune(params, sparsity=1 - np.sqrt(0.3))
        second = prune(first.params, sparsity=0.7, masks=first.masks)
        at_once = prune(params, sparsity=0.7, recomputations=2)
        for one, two in zip(*map(jax.tree.leaves, (first, second)), strict=True):
            if one.dtype == bool:
                assert not (two & ~one).any()
        jax.tree.map(np.testing.assert_array_equal, second.masks, at_once.masks)
        jax.tree.map(
            partial(np.testing.assert_allclose, **TOLERANCE),
            second.params,
            at_once.params,
        )


def test_a_kept_zero_does_not_give_its_place_to_a_pruned_weight():
    params = {"w": jnp.array([[3.0, 0.0, 0.0, 2.0]])}
    masks = {"w": jnp.array([[True, False, True, True]])}
    examples = {"x": {"w": jnp.zeros((1, 1, 4))}}
    result = second_order_prune(linear, params, examples, 0.25, masks=masks)
    np.testing.assert_array_equal(result.masks["w"], masks["w"])


def test_pruned_weights_of_masks_are_zeroed_and_count():
    params = {"w": jnp.array([[3.0, 9.0, 1.0, 2.0]])}
    masks = {"w": jnp.array([[True, False, True, True]])}
    examples = {"x": {"w": jnp.zeros((1, 1, 4))}}
    result = second_order_prune(linear, params, examples, 0.5, masks=masks)
    np.testing.assert_array_equal(result.params["w"], [[3.0, 0.0, 0.0, 2.0]])


@pytest.mark.parametrize("micro_batch", [1, 4, 7, 100])
def test_order_and_micro_batches_change_nothing(micro_batch):
    with jax.enable_x64(True):
        params = small_params()
        examples = examples_for(params, 30)
        prune = partial(second_order_prune, linear, params, sparsity=0.6, block_size=6)
        expected = prune(examples)
        shuffled = jax.tree.map(lambda x: x[::-1], examples)
        result = prune(shuffled, micro_batch=micro_batch)
        jax.tree.map(np.testing.assert_array_equal, result.masks, expected.masks)
        jax.tree.map(
            partial(np.testing.assert_allclose, **TOLERANCE),
            result.params,
            expected.params,
        )


def test_gradients_averaged_over_examples():
    with jax.enable_x64(True):
        params = small_params()
        examples = examples_for(params, 12)
        means = jax.tree.map(
            lambda x: x.reshape(4, 3, *x.shape[1:]).mean(1), examples
        )
        one = second_order_prune(
            linear, params, examples, 0.5, examples_per_gradient=3, damping=1e-3
        )
        other = second_order_prune(linear, params, means, 0.5, damping=1e-3)
        jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), one, other)


def test_only_the_chosen_leaves_change():
    params = small_params()
    pruned, masks = second_order_prune(
        linear, params, examples_for(params, 8), 0.5, where=lambda path, _: path == "two"
    )
    for name in ("bias", "one"):
        np.testing.assert_array_equal(pruned[name], params[name])
        assert masks[name].all()
    assert int(masks["two"].sum()) == 6
    bias, masks = second_order_prune(
        linear, params, examples_for(params, 8), 0.4, where=lambda path, _: path == "bias"
    )
    assert int(masks["bias"].sum()) == 2


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_stay_and_statistics_are_single_precision(dtype, x64):
    with jax.enable_x64(x64):
        params = jax.tree.map(lambda p: p.astype(dtype), small_params())
        examples = examples_for(params, 64)
        wide = jax.tree.map(lambda p: p.astype("float32"), params)

        def loss_fn(params, x):
            assert params["one"].dtype == dtype
            x = jax.tree.map(lambda a: a.astype(dtype), x)
            return linear(params, x)

        pruned, masks = second_order_prune(loss_fn, params, examples, 0.5, damping=0.01)
        expected = second_order_prune(linear, wide, examples, 0.5, damping=0.01)
        # The gradients are rounded to the dtype, the statistics are not: a few units
        # in the last place.
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        for name, leaf in pruned.items():
            assert (leaf.dtype, masks[name].dtype) == (jnp.dtype(dtype), bool)
            np.testing.assert_array_equal(leaf == 0, ~masks[name])
            np.testing.assert_array_equal(masks[name], expected.masks[name])
            np.testing.assert_allclose(
                leaf.astype("float32"), expected.params[name], atol=4 * tolerance, rtol=0
            )


def test_single_precision_with_the_smallest_damping_agrees_with_double():
    """Many collinear gradients of size 1 over a damping of 1e-7."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 3)) @ rng.normal(size=(3, 40))
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            root = fisher.damped_root(jnp.zeros((1, 40)), 1e-7)
            for row in x:
                root = absorb(root, jnp.asarray(row)[None] / 10)
            results.append(np.asarray(jnp.sum(root**2, -1)))
    np.testing.assert_allclose(*results, rtol=1e-2)
