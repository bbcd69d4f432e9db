import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cram_jax import (
    Projection,
    cached,
    compose,
    compress,
    fake_quant,
    mxfp4,
    n_m,
    one_of,
    stateless,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def use(projector, trees, key=None):
    """Projects the trees in turn; gives the projections and the last state."""
    state = projector.init(trees[0])
    keys = [None] * len(trees) if key is None else jax.random.split(key, len(trees))
    projections = []
    for tree, k in zip(trees, keys, strict=True):
        projection, state = projector.project(tree, state, k)
        projections.append(projection)
    return projections, state


def kernels(count, shape=(5, 7)):
    return [{"w": jax.random.normal(jax.random.key(i), shape)} for i in range(count)]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_masks_are_those_of_the_last_refresh(every):
    trees = kernels(7)
    projections, state = use(cached(top_k(0.6), every=every), trees)
    for index, (tree, projection) in enumerate(zip(trees, projections, strict=True)):
        fresh = compress(trees[index - index % every], top_k(0.6))
        np.testing.assert_array_equal(projection.masks["w"], fresh.masks["w"])
        expected = jnp.where(fresh.masks["w"], tree["w"], 0)
        np.testing.assert_array_equal(projection.params["w"], expected)
    assert int(state.uses) == 7


@jax.jit
def first_use_and_plain(params):
    (projection,), _ = use(cached(top_k(0.5), every=20), [params])
    return projection, compress(params, top_k(0.5))


@given(strategies.trees())
def test_the_first_use_is_the_projector_itself(params):
    jax.tree.map(np.testing.assert_array_equal, *first_use_and_plain(params))


def test_the_state_holds_one_bit_an_entry():
    params = {"w": jnp.ones((64, 256)), "bias": jnp.ones(3), "scale": jnp.ones(())}
    state = cached(top_k(0.5), every=20).init(params)
    assert state.bits["w"].nbytes * 32 == params["w"].nbytes
    assert {leaf.dtype for leaf in jax.tree.leaves(state.bits)} == {jnp.dtype("uint8")}


@pytest.mark.parametrize("spec", [P("d"), P(None, "d")], ids=["rows", "columns"])
def test_it_needs_no_jit_on_explicit_axes(spec):
    # Types tell shardings, on a mesh of one device too.
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))
    plain = kernels(2, (4, 12))
    expected, _ = use(cached(top_k(0.5), every=2), plain)
    with jax.set_mesh(mesh):
        trees = jax.device_put(plain, jax.NamedSharding(mesh, spec))
        projections, _ = use(cached(top_k(0.5), every=2), trees)
        for tree, ours in zip(trees, projections, strict=True):
            assert jax.typeof(ours.params["w"]) == jax.typeof(tree["w"])
    for ours, other in zip(projections, expected, strict=True):
        np.testing.assert_array_equal(
            *(np.asarray(p.masks["w"]) for p in (ours, other))
        )


@pytest.mark.several_devices
def test_masks_are_cached_on_axes_that_their_bytes_do_not_divide():
    mesh = jax.make_mesh(
        (6,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:6]
    )
    (plain,) = kernels(1, (4, 12))
    projector = cached(top_k(0.5), every=2)
    with jax.set_mesh(mesh):
        spread = jax.device_put(plain, jax.NamedSharding(mesh, P(None, "d")))
        (ours,), _ = use(projector, [spread])
    (expected,), _ = use(projector, [plain])
    np.testing.assert_array_equal(ours.masks["w"], expected.masks["w"])


def test_members_of_one_of_count_their_own_uses():
    projector = one_of(cached(top_k(0.5), every=2), cached(top_k(0.8), every=2))
    _, (first, second) = use(projector, kernels(6), jax.random.key(1))
    assert int(first.uses) + int(second.uses) == 6
    assert 0 < int(first.uses) < 6


def test_the_state_of_the_projector_inside_moves_when_masks_are_computed():
    outer = cached(cached(top_k(0.5), every=5), every=2)
    _, state = use(outer, kernels(6), None)
    assert int(state.uses) == 6
    assert int(state.inner.uses) == 3


def test_what_it_cannot_keep_is_refused():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        cached(top_k(0.5), every=0)
    for every in (2.0, True):
        with pytest.raises(TypeError, match="every must be an integer, got"):
            cached(top_k(0.5), every=every)
    with pytest.raises(TypeError, match="projector must be a Projector, got 0.5"):
        cached(0.5, every=2)
    with pytest.raises(ValueError, match="4 does not divide its 5 inputs"):
        cached(n_m(2, 4), every=2).init(kernels(1)[0])


@pytest.mark.parametrize(
    "projector",
    [
        fake_quant(2),
        mxfp4(),
        compose(top_k(0.5), fake_quant(2)),
        one_of(top_k(0.5), compose(top_k(0.5), fake_quant(2))),
    ],
)
def test_rounding_would_be_lost_and_is_refused(projector):
    with pytest.raises(ValueError, match="projector must only set entries to zero"):
        cached(projector, every=3)


def test_masks_are_cached_before_rounding():
    tree = kernels(1)[0]
    projector = compose(cached(top_k(0.5), every=3), fake_quant(2))
    expected = compress(tree, compose(top_k(0.5), fake_quant(2)))
    jax.tree.map(np.testing.assert_array_equal, compress(tree, projector), expected)


def test_projectors_of_ones_own_are_cached():
    def project(params, key):
        masks = jax.tree.map(lambda leaf: leaf > 0, params)
        positive = jax.tree.map(lambda leaf: jnp.maximum(leaf, 0), params)
        return Projection(positive, masks)

    tree = kernels(1)[0]
    (kept, _), *_ = use(cached(stateless(project, "positive"), every=2), [tree])[0]
    np.testing.assert_array_equal(kept["w"], np.maximum(tree["w"], 0))
