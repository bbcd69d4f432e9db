import functools
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import strategies
from hypothesis import given
from hypothesis import strategies as st

from cram_jax import compress, fake_quant, n_m, top_k
from cram_jax.sparsity import kept_count

pytestmark = pytest.mark.usefixtures("quick_compilation")


def kernels(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim >= 2]


def assert_masks_match(params, projection):
    """Kept entries are untouched, the others zero; leaves and dtypes stay."""
    for before, after, mask in zip(
        *map(jax.tree.leaves, (params, *projection)), strict=True
    ):
        assert after.dtype == before.dtype
        assert mask.dtype == bool
        assert mask.shape == before.shape
        np.testing.assert_array_equal(after, np.where(mask, before, 0))


@given(strategies.trees(), strategies.sparsities())
def test_top_k_keeps_exactly_k_of_all_leaves(params, sparsity):
    projection = compress(params, top_k(sparsity))
    size = sum(leaf.size for leaf in kernels(params))
    kept = sum(int(mask.sum()) for mask in kernels(projection.masks))
    # A share of these few entries computed in float64 is an integer or far from one.
    removed = int(Fraction(str(sparsity)) * size + Fraction(size, 2**52))
    assert kept == size - min(removed, size - 1)
    assert projection.masks["bias"].all()
    assert_masks_match(params, projection)


@given(strategies.trees(), strategies.sparsities())
def test_top_k_agrees_with_a_stable_sort(params, sparsity):
    masks = kernels(compress(params, top_k(sparsity)).masks)
    leaves = kernels(params)
    k = kept_count(sum(leaf.size for leaf in leaves), sparsity)
    for mask, expected in zip(masks, references.keep_largest(leaves, k), strict=True):
        np.testing.assert_array_equal(mask, expected)


@given(strategies.trees(), strategies.sparsities())
def test_top_k_by_layer_prunes_each_leaf_alone(params, sparsity):
    projection = compress(params, top_k(sparsity, scope="layer"))
    assert_masks_match(params, projection)
    for leaf, mask in zip(kernels(params), kernels(projection.masks), strict=True):
        (alone,) = references.keep_largest([leaf], kept_count(leaf.size, sparsity))
        np.testing.assert_array_equal(mask, alone)


@given(
    strategies.trees(), strategies.sparsities(), st.sampled_from(["global", "layer"])
)
def test_top_k_twice_is_top_k_once(params, sparsity, scope):
    projector = top_k(sparsity, scope=scope)
    once = compress(params, projector)
    twice = compress(once.params, projector)
    jax.tree.map(np.testing.assert_array_equal, once.params, twice.params)


def test_a_new_sparsity_does_not_recompile():
    params = [jnp.arange(1.0, 101.0).reshape(10, 10)]
    traces = 0

    @jax.jit
    def pruned(sparsity):
        nonlocal traces
        traces += 1
        return compress(params, top_k(sparsity)).masks[0].sum()

    assert [int(pruned(jnp.float32(s))) for s in (0.1, 0.29, 0.9)] == [90, 71, 10]
    assert traces == 1


def test_top_k_prunes_only_where_told():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "c": jnp.ones(4)}
    for where in (lambda path, leaf: path != "a", {"a": False, "b": True, "c": True}):
        masks = compress(params, top_k(0.75, where=where)).masks
        assert masks["a"].all()
        assert int(masks["b"].sum() + masks["c"].sum()) == 2


@given(
    strategies.trees(),
    strategies.sparsities(),
    st.tuples(*[st.sampled_from([0.25, 1.0, 2.0, 64.0])] * 3),
)
def test_a_scale_multiplies_the_magnitudes_of_its_leaf(params, sparsity, factors):
    """Powers of two, so that no product is rounded."""
    scale = {f"layers/{i}": factor for i, factor in enumerate(factors)}
    projection = compress(params, top_k(sparsity, scale=scale))
    assert_masks_match(params, projection)
    leaves = kernels(params)
    products = [
        np.asarray(leaf, np.float64) * factor
        for leaf, factor in zip(leaves, factors, strict=False)
    ]
    k = kept_count(sum(leaf.size for leaf in leaves), sparsity)
    for mask, expected in zip(
        kernels(projection.masks), references.keep_largest(products, k), strict=True
    ):
        np.testing.assert_array_equal(mask, expected)


def test_a_scale_multiplies_the_norms_of_blocks():
    params = {
        name: np.random.default_rng(i).normal(size=(4, 6)).astype(np.float32)
        for i, name in enumerate("ab")
    }
    options = {"block": (2, 3), "scale": lambda path, leaf: {"a": 3.0, "b": 0.7}[path]}
    masks = compress(params, top_k(0.5, **options)).masks
    norms = [
        factor * references.block_rms(params[name], (2, 3))
        for name, factor in (("a", 3.0), ("b", 0.7))
    ]
    expected = references.keep_largest(norms, 4)
    for mask, kept in zip(masks.values(), expected, strict=True):
        np.testing.assert_array_equal(mask, kept.repeat(2, 0).repeat(3, 1))


def test_by_the_root_of_its_cost_most_energy_is_kept_for_what_is_spent():
    """No other choice has more squares for at most as many multiply-adds."""
    weights = np.random.default_rng(0).normal(size=(2, 5, 1)).astype(np.float32)
    costs = {"a": 64, "b": 4}
    scale = {name: cost**-0.5 for name, cost in costs.items()}
    params = dict(zip(costs, weights, strict=True))
    masks = compress(params, top_k(0.6, scale=scale)).masks
    each = np.repeat([64, 4], 5)
    kept = np.concatenate([np.ravel(mask) for mask in masks.values()])
    squares = weights.ravel().astype(np.float64) ** 2
    every = (np.arange(2**10)[:, None] >> np.arange(10) & 1).astype(bool)
    affordable = every @ each <= kept @ each
    assert (every @ squares)[affordable].max() == pytest.approx(kept @ squares)


def test_scales_are_values():
    projector = top_k(0.5, scale={"b": np.float32(2), "a": 1})
    assert projector == top_k(0.5, scale={"a": 1.0, "b": 2.0})
    assert hash(projector) == hash(top_k(0.5, scale={"a": 1.0, "b": 2.0}))
    assert repr(projector) == "top_k(0.5, scale={'a': 1.0, 'b': 2.0})"
    assert top_k(0.5) == top_k(0.5, scale=None)


def test_scales_may_be_arrays_but_not_read_traced_weights():
    params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[4.0, 3.0]])}
    inverse = jax.tree.map(lambda leaf: 1 / leaf.max(), params)
    expected = compress(params, top_k(0.5, scale={"a": 0.5, "b": 0.25})).masks
    chex.assert_trees_all_equal(
        compress(params, top_k(0.5, scale=inverse)).masks, expected
    )
    numbers = {"a": jnp.array(0.5), "b": jnp.array(0.25)}
    same = top_k(0.5, scale=lambda path, leaf: 1 * numbers[path])
    chex.assert_trees_all_equal(compress(params, same).masks, expected)
    with pytest.raises(TypeError, match=r"^scale must not read .* of 'a'"):
        compress(params, top_k(0.5, scale=lambda path, leaf: 1 / leaf.max()))


def test_scales_that_make_no_sense_are_refused():
    for number in (0.0, -1.0, float("inf"), float("nan"), True):
        with pytest.raises(ValueError, match="scale must be positive and finite, got"):
            top_k(0.5, scale={"a": number})
    with pytest.raises(TypeError, match="scale must be a tree of positive numbers"):
        top_k(0.5, scale={"a": "much"})
    with pytest.raises(ValueError, match="scope must be 'global' with it, got 'layer'"):
        top_k(0.5, scope="layer", scale={"a": 1.0})
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="every leaf that is pruned, among them 'b'"):
        top_k(0.5, scale={"a": 1.0}).init(params)
    with pytest.raises(ValueError, match="positive and finite, got -1 for 'a'"):
        top_k(0.5, scale=lambda path, leaf: -1).init(params)


@functools.partial(jax.jit, static_argnames=("n", "m"))
def once_and_twice(kernel, n, m):
    once = compress([kernel], n_m(n, m))
    return once, compress(once.params, n_m(n, m))


@given(
    st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 3)]),
    st.sampled_from([(1, 1), (3, 1, 2, 2)]),
    st.sampled_from(strategies.DTYPES),
    st.data(),
)
def test_n_m_agrees_with_a_stable_sort(group, shape, dtype, data):
    n, m = group
    shape = (*shape[:-2], shape[-2] * m, shape[-1])
    kernel = data.draw(strategies.arrays(shape, dtype))
    once, twice = once_and_twice(kernel, n, m)
    assert_masks_match([kernel], once)
    np.testing.assert_array_equal(once.masks[0], references.n_m(kernel, n, m))
    np.testing.assert_array_equal(twice.params[0], once.params[0])


def test_n_m_leaves_a_leaf_dense_that_m_does_not_divide():
    params = {"stem": jnp.ones((3, 3, 3, 8)), "conv": jnp.ones((3, 3, 8, 8))}
    masks = compress(params, n_m(2, 4)).masks
    assert masks["stem"].all()
    assert int(masks["conv"].sum()) == masks["conv"].size // 2


@pytest.mark.parametrize("sparsity", [1.0, 1, 1.5, -0.1, float("nan"), np.float32(1)])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(
        ValueError, match=r"sparsity must be at least 0 and below 1, got"
    ):
        top_k(sparsity)


@pytest.mark.parametrize("sparsity", ["half", None, [0.5, 0.7]])
def test_a_sparsity_that_is_no_number_is_refused(sparsity):
    with pytest.raises(TypeError, match=r"sparsity must be a number .* got"):
        top_k(sparsity)


def test_an_unknown_scope_is_refused():
    with pytest.raises(
        ValueError, match="scope must be 'global' or 'layer', got 'row'"
    ):
        top_k(0.5, scope="row")


@pytest.mark.parametrize(("n", "m"), [(3, 2), (0, 4), (-1, 4)])
def test_n_out_of_range_is_refused(n, m):
    with pytest.raises(ValueError, match=f"n must be between 1 and m={m}, got n={n}"):
        n_m(n, m)


@pytest.mark.parametrize(("n", "m"), [(2.0, 4), (2, "4"), (True, 4)])
def test_n_and_m_must_be_integers(n, m):
    with pytest.raises(TypeError, match="must be an integer, got"):
        n_m(n, m)


def test_n_m_refuses_parameters_that_m_divides_nowhere():
    expected = r"n_m\(2, 4\) fits no prunable leaf: '0' of shape \(3, 4\): 4 does not"
    with pytest.raises(ValueError, match=expected):
        n_m(2, 4).init([jnp.ones((3, 4))])


@pytest.mark.parametrize("projector", [top_k(0.5), n_m(2, 4)])
def test_integer_parameters_are_refused(projector):
    with pytest.raises(TypeError, match="'w'.*int32, expected a floating dtype"):
        projector.init({"w": jnp.ones((4, 4), jnp.int32)})


@pytest.mark.parametrize("projector", [top_k(0.5), n_m(2, 4)])
def test_parameters_with_nothing_to_prune_are_refused(projector):
    with pytest.raises(ValueError, match="chooses no leaf to prune"):
        projector.init({"bias": jnp.ones(4)})


@pytest.mark.parametrize("projector", [n_m(2, 4), top_k(0.5), fake_quant(4)])
def test_parameters_may_be_numpys_float64(projector):
    kernel = np.random.default_rng(0).normal(size=(4, 2))
    ours = compress({"kernel": kernel}, projector)
    expected = compress({"kernel": jnp.asarray(kernel, jnp.float32)}, projector)
    chex.assert_trees_all_equal(ours, expected)
