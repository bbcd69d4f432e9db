"""Training gives the same however the parameters are sharded."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cram_jax import compress, cram_plus, fake_quant, n_m, one_of, stacked, top_k

pytestmark = [
    pytest.mark.several_devices,
    pytest.mark.usefixtures("quick_compilation"),
]


def make_params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "first": {"kernel": jax.random.normal(keys[0], (8, 16)), "bias": jnp.ones(16)},
        # Five rows: no mesh of ours divides them.
        "last": {"kernel": jax.random.normal(keys[1], (16, 5))},
    }


def loss_fn(params, x, y):
    """Parameters are gathered for use, as FSDP does; explicit axes want it said."""
    if any(
        kind is AxisType.Explicit for kind in jax.typeof(x).sharding.mesh.axis_types
    ):
        params = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params)
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean((hidden @ params["last"]["kernel"] - y) ** 2)


def train(params, put_batch, steps=5):
    projector = one_of(top_k(0.5), top_k(0.9), n_m(2, 4), fake_quant(4))
    optimizer = optax.chain(
        cram_plus(loss_fn, projector, 0.1), optax.sgd(0.1, momentum=0.9)
    )

    @jax.jit
    def advance(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, **batch)
        updates, state = optimizer.update(grads, state, params, **batch)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for step in range(steps):
        x = jax.random.normal(jax.random.key(step), (16, 8))
        batch = put_batch({"x": np.asarray(x), "y": np.asarray(x[:, :5]) ** 2})
        params, state, loss = advance(params, state, batch)
        losses.append(float(loss))
    return jax.tree.map(np.asarray, params), losses


LAYOUTS = {
    "data parallel": {"first": (P(), P()), "last": P()},
    "fsdp": {"first": (P("fsdp"), P("fsdp")), "last": P("fsdp")},
    "fsdp along two axes": {
        "first": (P(("data", "fsdp")), P("fsdp")),
        "last": P(("data", "fsdp")),
    },
    "columns, then rows": {"first": (P(None, "fsdp"), P("fsdp")), "last": P("fsdp")},
}


@pytest.fixture(scope="module")
def on_one_device():
    return train(make_params(), lambda batch: batch)


SHAPES = [(1, 1), (2, 1), (2, 2), (2, 4), (8, 1)]
AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]


def cases():
    """All combinations; those that are not for nightly have all pairs.

    But for the mesh of two devices, which has nothing that the others lack.
    """
    for case in itertools.product(*map(enumerate, (LAYOUTS, SHAPES, AXIS_TYPES))):
        indices, values = zip(*case, strict=True)
        is_nightly = sum(indices) % 2 or values[1] == (2, 1)
        marks = [pytest.mark.nightly] if is_nightly else []
        yield pytest.param(*values, marks=marks, id="-".join(map(str, values)))


@pytest.mark.parametrize(("layout", "shape", "axis_type"), [*cases()])
def test_training_on_a_mesh_equals_training_on_one_device(
    layout, shape, axis_type, on_one_device
):
    expected, losses = on_one_device
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(
        shape, ("data", "fsdp"), devices=devices, axis_types=(axis_type,) * 2
    )
    specs = LAYOUTS[layout]
    specs = {
        "first": {"kernel": specs["first"][0], "bias": specs["first"][1]},
        "last": {"kernel": specs["last"]},
    }
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, spec: jax.device_put(
                np.asarray(leaf), NamedSharding(mesh, spec)
            ),
            make_params(),
            specs,
        )
        batch_sharding = NamedSharding(mesh, P("data"))
        actual, on_mesh = train(
            params, lambda batch: jax.device_put(batch, batch_sharding)
        )
    np.testing.assert_allclose(on_mesh, losses, rtol=1e-4)
    chex.assert_trees_all_close(actual, expected, rtol=1e-3, atol=1e-4)
    for sparsity in (0.5, 0.9):
        chex.assert_trees_all_equal(
            compress(jax.tree.map(jnp.asarray, actual), top_k(sparsity)).masks,
            compress(jax.tree.map(jnp.asarray, expected), top_k(sparsity)).masks,
        )


@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P(None, None, "d"), P()])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_stacked_layers_are_pruned_wherever_they_are(axis_type, spec):
    values = jax.random.normal(jax.random.key(0), (4, 8, 8))
    projector = top_k(0.5, scope="layer", axes=stacked(""))
    expected = compress({"k": values}, projector).masks["k"]
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        params = {"k": jax.device_put(values, NamedSharding(mesh, spec))}
        for project in (compress, jax.jit(compress, static_argnames="projector")):
            mask = project(params, projector=projector).masks["k"]
            np.testing.assert_array_equal(mask, expected)
            assert mask.sharding.is_equivalent_to(params["k"].sharding, 3)
