"""Smaller modules of each framework, rebuilt from the smaller arrays."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from structure.comparing import filled, masked, some_kept

from cram_jax import compress
from cram_jax.structure import (
    channels,
    check_apply,
    group_masks,
    small_module,
    small_shapes,
    trace_structure,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.down = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.norm(self.up(x))))


def float32(tree):
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), tree)


def test_an_nnx_module_takes_the_smaller_arrays():
    graph, state = nnx.split(nnx.eval_shape(lambda: Mlp(nnx.Rngs(0))))
    structure = trace_structure(lambda s, x: nnx.merge(graph, s)(x), state, X)
    state = float32(filled(state))
    kept = some_kept(structure)
    assert check_apply(structure, kept) is None
    module = nnx.merge(graph, state)
    small = small_module(structure, module, kept)
    dense = nnx.merge(graph, masked(group_masks(structure, kept), state))
    assert small.up.kernel.shape == (6, 10)
    assert small.norm.mean.shape == (10,)
    assert (small.up.out_features, small.down.in_features) == (10, 10)
    assert (small.norm.num_features, module.norm.num_features) == (10, 16)
    np.testing.assert_allclose(small(X), dense(X), atol=1e-5)


def test_a_depthwise_convolution_is_told_its_new_groups():
    images = np.random.default_rng(2).normal(size=(1, 5, 5, 3)).astype(np.float32)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(3, 8, (1, 1), rngs=rngs),
        nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs),
        nnx.Conv(16, 2, (1, 1), rngs=rngs),
    )
    graph, state = nnx.split(model)
    structure = trace_structure(lambda s, x: nnx.merge(graph, s)(x), state, images)
    kept = some_kept(structure)
    assert "feature_group_count" in check_apply(structure, kept)
    small = small_module(structure, model, kept)
    depthwise = small.layers[1]
    assert depthwise.feature_group_count == depthwise.in_features == 5
    dense = nnx.merge(graph, masked(group_masks(structure, kept), state))
    np.testing.assert_allclose(small(images), dense(images), atol=1e-5)


def test_modules_that_cannot_be_made_smaller_are_refused():
    def reshaped(module, x):
        return module.down(module.up(x).reshape(2, 16))

    model = Mlp(nnx.Rngs(0))
    graph, state = nnx.split(model)
    structure = trace_structure(
        lambda s, x: reshaped(nnx.merge(graph, s), x), state, X[:2]
    )
    kept = some_kept(structure)
    with pytest.raises(ValueError, match=r"reshape.*; use small_apply instead"):
        small_module(structure, model, kept, call=reshaped)
    with pytest.raises(TypeError, match="Dense, which holds no arrays and compares"):
        small_module(structure, nn.Dense(3), kept)
    with pytest.raises(TypeError, match="an nnx.Module or an eqx.Module, got builtins"):
        small_module(structure, {}, kept)


def test_the_parameters_of_an_nnx_module_are_projected_as_state_and_as_pure_tree():
    graph, params, rest = nnx.split(
        nnx.eval_shape(lambda: Mlp(nnx.Rngs(0))), nnx.Param, ...
    )

    def apply(variables, x):
        return nnx.merge(graph, *variables)(x)

    structure = trace_structure(apply, (params, rest), X)
    part = structure.part(lambda variables: variables[0])
    params = float32(filled(params))
    projector = channels(0.5, part)
    of_state = compress(params, projector).masks
    of_pure = compress(nnx.to_pure_dict(params), projector).masks
    pairs = zip(jax.tree.leaves(of_state), jax.tree.leaves(of_pure), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
    assert sum(of_pure["norm"]["scale"]) == 8


def test_an_equinox_module_takes_the_smaller_arrays():
    model = eqx.filter_eval_shape(
        lambda: eqx.nn.MLP(6, 3, 16, 2, key=jax.random.key(0))
    )
    arrays, static = eqx.partition(model, lambda leaf: hasattr(leaf, "shape"))
    structure = trace_structure(
        lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x), arrays, X
    )
    arrays = float32(filled(arrays))
    kept = some_kept(structure)
    assert check_apply(structure, kept) is None
    small = small_module(
        structure,
        eqx.combine(jax.tree.map(jnp.asarray, arrays), static),
        kept,
        call=lambda module, x: jax.vmap(module)(x),
    )
    dense = eqx.combine(masked(group_masks(structure, kept), arrays), static)
    assert small.layers[1].weight.shape == (10, 10)
    assert (small.layers[1].in_features, small.layers[0].out_features) == (10, 10)
    np.testing.assert_allclose(
        jax.vmap(small)(jnp.asarray(X)), jax.vmap(dense)(jnp.asarray(X)), atol=1e-5
    )


@pytest.mark.parametrize(
    "norm",
    [eqx.nn.LayerNorm(6), eqx.nn.RMSNorm(6), eqx.nn.GroupNorm(2, 6)],
    ids=lambda norm: type(norm).__name__,
)
def test_equinox_modules_with_weights_of_one_dimension_get_smaller(norm):
    class Model(eqx.Module):
        norm: eqx.Module
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __call__(self, x):
            return self.down(jax.nn.relu(self.up(self.norm(x))))

    keys = jax.random.split(jax.random.key(0))
    model = Model(
        norm, eqx.nn.Linear(6, 16, key=keys[0]), eqx.nn.Linear(16, 3, key=keys[1])
    )
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    structure = trace_structure(
        lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x), arrays, X
    )
    kept = some_kept(structure)
    small = small_module(
        structure, model, kept, call=lambda module, x: jax.vmap(module)(x)
    )
    dense = eqx.combine(masked(group_masks(structure, kept), arrays), static)
    assert small.up.out_features == int(kept.sum()) < 16
    np.testing.assert_allclose(
        jax.vmap(small)(jnp.asarray(X)), jax.vmap(dense)(jnp.asarray(X)), atol=1e-5
    )


def test_a_haiku_model_is_built_with_the_widths_of_the_smaller_arrays():
    def model(widths):
        return hk.without_apply_rng(
            hk.transform(lambda x: hk.nets.MLP(widths, name="mlp")(x))
        )

    dense = model([16, 12, 3])
    params = jax.eval_shape(dense.init, jax.random.key(0), X)
    structure = trace_structure(dense.apply, params, X)
    kept = some_kept(structure)
    assert "retrieved shape" in check_apply(structure, kept)
    shapes = small_shapes(structure, kept)
    widths = [shapes[f"mlp/~/linear_{i}/b"][0] for i in range(3)]
    assert widths == [10, 7, 3]
    assert check_apply(structure, kept, apply=model(widths).apply) is None


def test_an_equinox_embedding_loses_channels():
    """Under `jax.vmap` its lookup has an index for the channels, too: 0."""

    class Model(eqx.Module):
        embedding: eqx.nn.Embedding
        head: eqx.nn.Linear

        def __init__(self):
            keys = jax.random.split(jax.random.key(0))
            self.embedding = eqx.nn.Embedding(7, 6, key=keys[0])
            self.head = eqx.nn.Linear(6, 2, key=keys[1])

        def __call__(self, tokens):
            return jax.vmap(self.head)(jax.vmap(self.embedding)(tokens))

    model, tokens = Model(), jnp.array([1, 2, 6])
    arrays, static = eqx.partition(model, eqx.is_array)
    structure = trace_structure(
        lambda arrays, x: eqx.combine(arrays, static)(x), arrays, tokens
    )
    table = structure.leaves[0]
    assert (table.path, table.roles) == ("embedding/weight", ("lookup", "output"))
    kept = np.array([True, False, True, True, False, True])
    small = small_module(structure, model, kept)
    assert small.embedding.embedding_size == 4
    pruned = jax.tree.map(jnp.asarray, masked(group_masks(structure, kept), arrays))
    expected = eqx.combine(pruned, static)(tokens)
    np.testing.assert_allclose(small(tokens), expected, rtol=1e-5)
