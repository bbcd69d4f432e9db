"""Smaller modules of each framework, rebuilt from the smaller arrays."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from structure.comparing import filled, masked, some_kept

from cram_jax import compress
from cram_jax.structure import (
    channels,
    check_apply,
    group_masks,
    shrink,
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
    small = nnx.merge(graph, shrink(structure, state, kept))
    dense = nnx.merge(graph, masked(group_masks(structure, kept), state))
    assert small.up.kernel.shape == (6, 10)
    assert small.norm.mean.shape == (10,)
    np.testing.assert_allclose(small(X), dense(X), atol=1e-5)


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
    small = eqx.combine(shrink(structure, arrays, kept), static)
    dense = eqx.combine(masked(group_masks(structure, kept), arrays), static)
    assert small.layers[1].weight.shape == (10, 10)
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
