"""Wanda, SparseGPT and refitting, beside NumPy written from the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cram_jax import (
    Axes,
    compose,
    compress,
    fake_quant,
    matching,
    n_m,
    scheduled,
    sparsity_report,
    top_k,
)
from cram_jax.layerwise import per_leaf, refit, sparse_gpt, wanda
from cram_jax.sparsity import kept_count
from cram_jax.structure import input_grams

pytestmark = pytest.mark.usefixtures("quick_compilation")

INPUTS, OUTPUTS = 24, 5
PATTERNS = (0.0, 0.3, 0.9, (2, 4), (1, 3))


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def problem(seed=0, inputs=INPUTS, outputs=OUTPUTS, examples=40):
    """Weights, correlated inputs of very different sizes, and their products."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(size=inputs))
    x = (
        rng.normal(size=(examples, inputs)) @ rng.normal(size=(inputs, inputs))
    ) * sizes
    return rng.normal(size=(inputs, outputs)), x, x.T @ x


def prune(projector, weights):
    projection = compress({"kernel": jnp.asarray(weights)}, projector)
    return np.asarray(projection.params["kernel"]), np.asarray(
        projection.masks["kernel"]
    )


def test_the_inputs_of_a_square_kernel_are_those_that_were_read():
    weights, x, gram = problem(inputs=8, outputs=8)
    stored = {"w": jnp.asarray(weights.T)}  # as PyTorch has it
    inputs = input_grams(lambda params, x: x @ params["w"].T, stored, [jnp.asarray(x)])
    np.testing.assert_allclose(inputs.grams["w"], gram)
    for make in (wanda, sparse_gpt, lambda s, *args: refit(top_k(s), *args)):
        expected, _ = prune(make(0.5, {"kernel": gram}), weights)
        found = compress(stored, make(0.5, inputs)).params["w"]
        np.testing.assert_allclose(found, expected.T)
        assert repr(make(0.5, inputs)) == repr(make(0.5, {"w": gram}))


def damped(gram, damping):
    """The products with a share of their mean diagonal added, and no dead input."""
    diagonal = np.diag(gram)
    live = diagonal != 0
    return gram + np.diag(np.where(live, damping, 1) * diagonal.mean())


def error(weights, dense, matrix):
    moved = weights - dense
    return np.trace(moved.T @ matrix @ moved)


def wanda_masks(weights, x, pattern):
    """Output by output: the magnitude times the norm of its input."""
    masks = np.zeros(weights.shape, bool)
    norms = np.linalg.norm(x, axis=0)
    for output in range(weights.shape[1]):
        scores = np.abs(weights[:, output]) * norms
        if isinstance(pattern, tuple):
            n, m = pattern
            for first in range(0, len(scores), m):
                best = np.argsort(-scores[first : first + m], kind="stable")[:n]
                masks[first + best, output] = True
        else:
            kept = kept_count(len(scores), pattern)
            masks[np.argsort(-scores, kind="stable")[:kept], output] = True
    return masks


def optimal_brain_surgeon(weights, matrix, pattern, block, bits):
    """SparseGPT as its paper derives it, without a Cholesky factor.

    For each input the inverse Hessian of the inputs that are left is computed anew; row
    i of the factor, divided by its diagonal, is its first row divided by its first
    entry.
    """
    weights = weights.copy()
    count = len(weights)
    highest = 0 if bits is None else 2 ** (bits - 1) - 1
    scale = np.abs(weights).max(axis=0) / max(highest, 1)
    inverses = [np.linalg.inv(matrix[i:, i:]) for i in range(count)]
    # U_ii^2 is the first entry of the inverse of what is left.
    diagonal = np.sqrt([inverse[0, 0] for inverse in inverses])
    masks = np.zeros(weights.shape, bool)
    group = pattern[1] if isinstance(pattern, tuple) else block
    for i in range(count):
        if i % group == 0:
            last = min(i + group, count)
            scores = weights[i:last] / diagonal[i:last, None]
            if isinstance(pattern, tuple):
                masks[i:last] = references.n_m(scores, *pattern)
            else:
                kept = kept_count(scores.size, pattern)
                (masks[i:last],) = references.keep_largest([scores], kept)
        left = weights[i]
        if bits is not None:
            left = np.clip(np.round(left / scale), -highest, highest) * scale
        left = np.where(masks[i], left, 0)
        inverse = inverses[i]
        weights[i:] -= np.outer(inverse[0] / inverse[0, 0], weights[i] - left)
        weights[i] = left
    return weights, masks


def least_squares(weights, masks, matrix):
    """The best weights of each output, from a square root of the matrix."""
    root = np.linalg.cholesky(matrix).T
    best = np.zeros(weights.shape)
    for output in range(weights.shape[1]):
        kept = masks[:, output]
        target = root @ weights[:, output]
        best[kept, output] = np.linalg.lstsq(root[:, kept], target)[0]
    return best


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_keeps_the_largest_products_of_each_output(pattern):
    weights, x, gram = problem()
    pruned, masks = prune(wanda(pattern, {"kernel": gram}), weights)
    np.testing.assert_array_equal(masks, wanda_masks(weights, x, pattern))
    np.testing.assert_array_equal(pruned, np.where(masks, weights, 0))


def test_wanda_of_a_layer_compares_all_its_weights():
    weights, x, gram = problem()
    _, masks = prune(wanda(0.7, {"kernel": gram}, scope="layer"), weights)
    scores = np.abs(weights) * np.linalg.norm(x, axis=0)[:, None]
    (expected,) = references.keep_largest([scores], kept_count(scores.size, 0.7))
    np.testing.assert_array_equal(masks, expected)


@pytest.mark.parametrize(
    ("pattern", "block", "bits"),
    [
        *((pattern, 128, None) for pattern in PATTERNS),
        (0.5, 7, None),
        ((2, 4), 7, None),
        (0.0, 128, 4),
        (0.5, 7, 4),
        ((2, 4), 128, 4),
    ],
)
def test_sparse_gpt_is_the_surgeon_taken_input_by_input(pattern, block, bits):
    weights, _, gram = problem(1)
    projector = sparse_gpt(pattern, {"kernel": gram}, block=block, bits=bits)
    pruned, masks = prune(projector, weights)
    matrix = damped(gram, 0.01)
    expected, chosen = optimal_brain_surgeon(weights, matrix, pattern, block, bits)
    np.testing.assert_array_equal(masks, chosen)
    # The reference inverts every trailing matrix, of condition 1e5.
    np.testing.assert_allclose(pruned, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "inner",
    [
        top_k(0.6),
        wanda(0.8, {"kernel": jnp.eye(INPUTS)}),
        sparse_gpt((2, 4), {"kernel": jnp.eye(INPUTS)}),
        top_k(0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("damping", [1e-2, 1e-6])
def test_refit_is_least_squares_on_the_weights_that_stay(inner, damping):
    weights, _, gram = problem(2)
    refitted, masks = prune(refit(inner, {"kernel": gram}, damping=damping), weights)
    np.testing.assert_array_equal(masks, prune(inner, weights)[1])
    matrix = damped(gram, damping)
    expected = least_squares(weights, masks, matrix)
    best = error(expected, weights, matrix)
    # Both solve systems of condition up to 1e7; their errors agree to more digits.
    np.testing.assert_allclose(refitted, expected, rtol=1e-5, atol=1e-6)
    found = error(refitted, weights, matrix)
    np.testing.assert_allclose(found, best, rtol=1e-9, atol=1e-18)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.29, 0.5, 0.9, 0.99, (2, 4)]),
    st.sampled_from([(12, 1), (12, 5)]),
    st.sampled_from(["dense", "dead inputs", "one example", "equal weights"]),
)
def test_counts_are_exact_and_refitting_never_makes_it_worse(
    seed, pattern, shape, kind
):
    weights, x, _ = problem(seed, *shape)
    if kind == "dead inputs":
        x[:, ::3] = 0
    elif kind == "one example":
        x = x[:1]
    elif kind == "equal weights":
        weights = np.ones_like(weights)
    grams = {"kernel": x.T @ x}
    matrix = damped(grams["kernel"], 0.01)
    for projector in (wanda(pattern, grams), sparse_gpt(pattern, grams)):
        pruned, masks = prune(projector, weights)
        if kind == "dead inputs" and isinstance(
            projector, type(sparse_gpt(0.5, grams))
        ):
            assert not pruned[::3].any()
        if isinstance(pattern, tuple):
            n, m = pattern
            counts = masks.reshape(-1, m, shape[1]).sum(axis=1)
            np.testing.assert_array_equal(counts, n)
        elif isinstance(projector, type(wanda(0.5, grams))):
            np.testing.assert_array_equal(masks.sum(0), kept_count(shape[0], pattern))
        else:
            assert masks.sum() == kept_count(masks.size, pattern)
        assert np.isfinite(pruned).all()
        assert not pruned[~masks].any()
        better, same = prune(refit(projector, grams), weights)
        np.testing.assert_array_equal(same, masks)
        assert not better[~masks].any()
        before = error(pruned, weights, matrix)
        assert error(better, weights, matrix) <= before * (1 + 1e-9) + 1e-12


def test_moving_the_weights_beats_masks_and_solving_for_them_beats_moving():
    """The order of the errors with the masks of SparseGPT, at little damping."""
    errors = np.zeros(3)
    for seed in range(10):
        weights, _, gram = problem(seed)
        surgeon = sparse_gpt(0.6, {"kernel": gram}, damping=1e-6)
        moved, masks = prune(surgeon, weights)
        solved, _ = prune(refit(surgeon, {"kernel": gram}, damping=1e-6), weights)
        masked = np.where(masks, weights, 0)
        own = [error(each, weights, gram) for each in (solved, moved, masked)]
        assert own[0] < min(own[1:])
        errors += np.log(own)
    assert errors[0] < errors[1] < errors[2]


# Axes that bring a leaf to (stacked, windows and inputs, outputs).
LAYOUTS = {
    "outputs first": ((5, 12), Axes("output", "input"), (1, 0)),
    "convolution": (
        (2, 2, 3, 5), Axes("window", "window", "input", "output"), (0, 1, 2, 3),
    ),
    "convolution, outputs first": (
        (5, 3, 2, 2), Axes("output", "input", "window", "window"), (2, 3, 1, 0),
    ),
    "heads": ((4, 3, 5), Axes("input", "input", "output"), (0, 1, 2)),
    "stacked": ((12, 2, 5), Axes("input", "stack", "output"), (1, 0, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_is_pruned_as_its_matrices(name):
    shape, axes, order = LAYOUTS[name]
    rng = np.random.default_rng(3)
    leaf = rng.normal(size=shape)
    layers = 2 if "stack" in axes.roles else 1
    outputs = shape[axes.roles.index("output")]
    matrices = leaf.transpose(order).reshape(layers, -1, outputs)
    x = rng.normal(size=(layers, 30, matrices.shape[1]))
    grams = x.transpose(0, 2, 1) @ x
    gram = grams if layers > 1 else grams[0]

    def make(gram, **options):
        solved = refit(
            wanda(0.5, {"kernel": gram}, **options), {"kernel": gram}, **options
        )
        return (
            wanda(0.5, {"kernel": gram}, **options),
            sparse_gpt(0.5, {"kernel": gram}, **options),
            solved,
        )

    tree = {"kernel": axes}
    for number, projector in enumerate(make(gram, axes=tree)):
        pruned, masks = prune(projector, leaf)
        pruned, masks = (
            array.transpose(order).reshape(matrices.shape) for array in (pruned, masks)
        )
        for layer in range(layers):
            each = make(grams[layer])[number]
            expected, chosen = prune(each, matrices[layer])
            np.testing.assert_array_equal(masks[layer], chosen)
            np.testing.assert_allclose(pruned[layer], expected, rtol=1e-9)


def test_leaves_without_products_stay_dense_and_the_report_says_so():
    params = {"a": {"kernel": jnp.ones((4, 2))}, "b": {"kernel": jnp.ones((4, 2))}}
    projector = wanda(0.5, {"a/kernel": jnp.eye(4)})
    projection = compress(params, projector)
    assert projection.masks["b"]["kernel"].all()
    report = sparsity_report(*projection, projector)
    assert "dense: nothing is known of its inputs" in str(report)


def test_they_compose_with_quantisation_and_work_in_a_program():
    weights, _, gram = problem(4)
    grams = {"kernel": gram}
    projector = compose(refit(sparse_gpt((2, 4), grams), grams), fake_quant(4))
    eager, masks = prune(projector, weights)
    assert all(len(set(column)) <= 15 for column in eager.T)
    compiled = jax.jit(lambda p: compress(p, projector))({"kernel": weights})
    np.testing.assert_array_equal(compiled.masks["kernel"], masks)
    np.testing.assert_allclose(compiled.params["kernel"], eager, rtol=1e-9)


def test_rounded_weights_are_those_that_fake_quant_leaves():
    weights, _, gram = problem(5)
    weights[0] = 9.0  # the largest of each output, and kept
    gram[0, 0] *= 100
    rounded, _ = prune(sparse_gpt(0.5, {"kernel": gram}, bits=4), weights)
    again, _ = prune(fake_quant(4), rounded)
    np.testing.assert_allclose(again, rounded, rtol=1e-12, atol=1e-12)


def test_each_leaf_has_its_own_projector():
    params = {name: jnp.arange(1.0, 13.0).reshape(4, 3) for name in "abc"}
    projector = per_leaf({"a": top_k(0.5), "c": top_k(0.75)})
    masks = compress(params, projector).masks
    assert [int(masks[name].sum()) for name in "abc"] == [6, 12, 3]
    assert projector == per_leaf({"a": top_k(0.5), "c": top_k(0.75)})
    bias = {"a": params["a"], "b": jnp.arange(1.0, 5.0)}
    masks = compress(bias, per_leaf({"a": top_k(0.5), "b": top_k(0.5)})).masks
    assert [int(masks[name].sum()) for name in "ab"] == [6, 2]


def test_each_leaf_has_the_axes_that_its_projector_knows():
    weights, x, _ = problem(inputs=8, outputs=8)
    stored = {"a": jnp.asarray(weights.T), "b": jnp.asarray(weights)}

    def model(params, x):
        return x @ params["a"].T + x @ params["b"]

    grams = input_grams(model, stored, [jnp.asarray(x)])
    given = {"a": Axes("output", "input"), "b": Axes("input", "output")}
    for projector in (sparse_gpt((2, 4), grams), n_m(2, 4, axes=given)):
        expected = compress(stored, projector)
        ours = compress(stored, per_leaf({"a": projector, "b": projector}))
        jax.tree.map(np.testing.assert_array_equal, ours, expected)
    told = per_leaf({"a": n_m(2, 4, axes=given)}, axes={"a": given["b"], "b": None})
    np.testing.assert_array_equal(
        compress(stored, told).masks["a"], compress(stored, n_m(2, 4)).masks["a"]
    )


def test_refitting_knows_of_a_schedule_and_of_all_that_it_changes():
    params, grams = {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 2))}, {"a": jnp.eye(4)}
    with pytest.raises(ValueError, match="follows a schedule"):
        compress(params, refit(scheduled(top_k, lambda step: 0.1 * step), grams))
    assert refit(top_k(0.5, where=matching("b")), grams).changes(params) == [True] * 2


def test_a_damping_that_inverts_nothing_is_refused():
    inputs = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    grams = {"kernel": jnp.asarray(inputs.T @ inputs)}
    params = {"kernel": jnp.ones((64, 3))}
    with pytest.raises(ValueError, match="damping=1e-12 is too small for 'kernel'"):
        compress(params, sparse_gpt(0.5, grams, damping=1e-12))


@pytest.mark.several_devices
@pytest.mark.parametrize("spec", [("d", None), (None, "d"), (None, None)])
@pytest.mark.parametrize("make", [wanda, sparse_gpt])
def test_leaves_on_explicit_axes_are_pruned_where_they_are(make, spec):
    weights, inputs = np.random.default_rng(0).standard_normal((2, 16, 16), np.float32)
    projector = make(0.5, {"kernel": jnp.asarray(inputs.T @ inputs)})
    expected = compress({"kernel": jnp.asarray(weights)}, projector)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        leaf = jax.device_put(weights, sharding)
        ours = compress({"kernel": leaf}, projector)
    np.testing.assert_array_equal(ours.masks["kernel"], expected.masks["kernel"])
    np.testing.assert_allclose(
        ours.params["kernel"], expected.params["kernel"], rtol=1e-5, atol=1e-6
    )
    assert jax.typeof(ours.masks["kernel"]).sharding == jax.typeof(leaf).sharding


@pytest.mark.parametrize("exponent", [-100, 100])
def test_weights_of_any_magnitude_are_refitted(exponent):
    weights, _, gram = problem()
    weights = weights.astype(np.float32)
    projector = refit(top_k(0.5), {"kernel": gram.astype(np.float32)})
    expected, _ = prune(projector, weights)
    refitted, _ = prune(projector, np.ldexp(weights, exponent))
    # A power of two changes no digit.
    np.testing.assert_array_equal(np.ldexp(refitted, -exponent), expected)


@pytest.mark.parametrize(
    "make",
    [
        wanda,
        sparse_gpt,
        lambda share, grams: sparse_gpt((2, 4), grams, bits=4),
        lambda share, grams: refit(top_k(share), grams),
    ],
)
def test_no_dtype_or_rank_is_promoted_silently(make):
    weights, x, _ = problem()
    narrow = {"kernel": jnp.asarray(weights, jnp.bfloat16)}
    batches = [jnp.asarray(x, jnp.bfloat16)]

    def prune_narrow():
        grams = input_grams(lambda p, x: x @ p["kernel"], narrow, batches)
        return compress(narrow, make(0.5, grams))

    expected = prune_narrow()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.tree.map(np.testing.assert_array_equal, prune_narrow(), expected)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize(
    "make", [wanda, sparse_gpt, lambda share, *args: refit(top_k(share), *args)]
)
def test_leaves_without_entries_stay_so(make, shape):
    weights, _, gram = problem()
    params = {"empty": jnp.zeros(shape), "kernel": jnp.asarray(weights)}
    grams = {"empty": jnp.zeros((shape[0],) * 2), "kernel": jnp.asarray(gram)}
    masks = compress(params, make(0.5, grams)).masks
    assert masks["empty"].shape == shape
    assert 0 < masks["kernel"].sum() < weights.size


def test_a_jitted_function_may_hold_the_products():
    weights, _, gram = problem()
    params, gram = {"kernel": jnp.asarray(weights)}, jnp.asarray(gram)

    def masks_by(gram):
        return lambda params: compress(params, wanda(0.5, {"kernel": gram})).masks

    ours = jax.jit(masks_by(gram))(params)
    jax.tree.map(np.testing.assert_array_equal, ours, masks_by(gram)(params))
    with pytest.raises(ValueError, match="must be finite"):
        jax.jit(masks_by(gram / 0))(params)


def test_weights_of_numpy_are_refitted_in_the_dtypes_that_jax_has():
    weights, _, gram = problem()
    with jax.enable_x64(False):
        params = {"kernel": weights}
        refitted = compress(params, refit(top_k(0.5), {"kernel": gram})).params
    assert refitted["kernel"].dtype == jnp.float32


@pytest.mark.several_devices
def test_layers_spread_over_explicit_axes_are_refitted_where_they_are():
    weights, inputs = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    grams = {"kernel": jnp.asarray(np.swapaxes(inputs, 1, 2) @ inputs)}
    axes = Axes("stack", "input", "output")
    projector = refit(top_k(0.5, axes={"kernel": axes}), grams, axes={"kernel": axes})
    expected = compress({"kernel": jnp.asarray(weights)}, projector).params["kernel"]
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("d", None, None))
        leaf = jax.device_put(weights, sharding)
        ours = compress({"kernel": leaf}, projector).params["kernel"]
    assert ours.sharding == sharding
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
