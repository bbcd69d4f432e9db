"""What devices exchange to project sharded parameters, read from compiled programs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.communication import collectives
from cram_jax import cached, compress, fake_quant, n_m, top_k

pytestmark = pytest.mark.several_devices

AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
# Each leaf along one axis, along several, along both at once, or not at all.
SPECS = [P("fsdp"), P(None, "fsdp"), P("data", "fsdp"), P(("data", "fsdp")), P()]


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("side", [160, 1600], ids=["1 million", "100 million"])
def test_a_global_projection_exchanges_less_than_four_kib(side, axis_type):
    layers = 40
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(axis_type,) * 2)
    params = {
        f"layer{index}": jax.ShapeDtypeStruct(
            (side, side), jnp.float32, sharding=NamedSharding(mesh, SPECS[index % 5])
        )
        for index in range(layers)
    }
    with jax.set_mesh(mesh):
        project = jax.jit(lambda params: compress(params, top_k(0.9)))
        compiled = project.lower(params).compile()
    found = collectives(compiled)
    assert {operation for operation, _ in found} == {"all-reduce"}
    # Two loops: over 31 bits of a magnitude, and those of a place, three at a time.
    passes = [11, -(-(layers * side**2).bit_length() // 3)]
    assert len(found) == len(passes)
    exchanged = sum(
        size * trips for (_, size), trips in zip(found, passes, strict=True)
    )
    assert exchanged <= 4096
    assert exchanged == 7 * 4 * sum(passes)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("projector", "operations"),
    [
        (top_k(0.9, scope="layer"), {"all-reduce"}),
        (n_m(2, 4), set()),
        (fake_quant(4), {"all-reduce"}),  # a maximum for each output channel
        (top_k(0.5, block=(1, 4)), {"all-reduce"}),
        (cached(top_k(0.9), every=3), {"all-reduce"}),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_a_projection_gathers_nothing(projector, operations, spec, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(axis_type,) * 2)
    values = jax.random.normal(jax.random.key(0), (64, 128))
    expected = compress({"kernel": values}, projector)
    with jax.set_mesh(mesh):
        kernel = jax.device_put(np.asarray(values), NamedSharding(mesh, spec))
        project = jax.jit(lambda params: compress(params, projector))
        compiled = project.lower({"kernel": kernel}).compile()
        actual = compiled({"kernel": kernel})
    assert {operation for operation, _ in collectives(compiled)} <= operations
    assert actual.params["kernel"].sharding.is_equivalent_to(kernel.sharding, 2)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
