"""What devices exchange to project sharded parameters, read from compiled programs."""

import itertools

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
# Along one axis, along several, along both at once, or not at all.
SPECS = [P("fsdp"), P(None, "fsdp"), P("data", "fsdp"), P(("data", "fsdp")), P()]


def exchanged(mesh, leaves):
    """The collectives of a global top_k: (operation, bytes)."""
    params = {
        f"layer{index}": jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, spec)
        )
        for index, (shape, spec) in enumerate(leaves)
    }
    with jax.set_mesh(mesh):
        project = jax.jit(lambda params: compress(params, top_k(0.9)))
        return collectives(project.lower(params).compile())


def check_counts_only(found, leaves):
    """Few sums in each of the two loops, and 64 KiB at most."""
    assert {operation for operation, _ in found} == {"all-reduce"}
    assert len(found) <= 2 * 3
    # Eleven passes over magnitudes, of seven counts an array; then one of three counts
    # for every two bits of a place.
    sizes = sorted(size for _, size in found)
    ties, counts = sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]
    entries = max(np.prod(shape) for shape, _ in leaves)
    passes = -(-int(entries).bit_length() // 2)
    assert 11 * sum(counts) + passes * sum(ties) <= 2**16


@pytest.mark.parametrize(
    "axis_type",
    [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.nightly)],
)
def test_a_projection_of_bert_base_exchanges_less_than_64_kib(axis_type):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))
    # As Megatron cuts them, but for equal shapes: those of a shape lie alike here.
    layer = [((768, 768), P("fsdp"))] * 4
    layer += [((768, 3072), P(None, "fsdp")), ((3072, 768), P("fsdp"))]
    leaves = [*layer * 12, ((30522, 768), P(None, "fsdp")), ((512, 768), P())]
    check_counts_only(exchanged(mesh, leaves), leaves)


def test_explicit_axes_may_differ_among_arrays_of_one_shape():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    leaves = [((160, 160), spec) for spec in SPECS * 2]
    check_counts_only(exchanged(mesh, leaves), leaves)


OPERATIONS = {
    top_k(0.9, scope="layer"): {"all-reduce"},
    n_m(2, 4): set(),
    fake_quant(4): {"all-reduce"},  # a maximum for each output channel
    top_k(0.5, block=(1, 4)): {"all-reduce"},
    cached(top_k(0.9), every=3): {"all-reduce"},
}


def cases():
    """All combinations; those that are not for nightly have all pairs."""
    for case in itertools.product(*map(enumerate, (OPERATIONS, SPECS, AXIS_TYPES))):
        indices, values = zip(*case, strict=True)
        marks = [pytest.mark.nightly] if sum(indices) % 2 else []
        yield pytest.param(*values, marks=marks, id="-".join(map(str, values)))


@pytest.mark.parametrize(("projector", "spec", "axis_type"), [*cases()])
def test_a_projection_gathers_nothing(projector, spec, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(axis_type,) * 2)
    values = jax.random.normal(jax.random.key(0), (64, 128))
    expected = compress({"kernel": values}, projector)
    with jax.set_mesh(mesh):
        kernel = jax.device_put(np.asarray(values), NamedSharding(mesh, spec))
        project = jax.jit(lambda params: compress(params, projector))
        compiled = project.lower({"kernel": kernel}).compile()
        actual = compiled({"kernel": kernel})
    found = {operation for operation, _ in collectives(compiled)}
    assert found <= OPERATIONS[projector]
    assert actual.params["kernel"].sharding.is_equivalent_to(kernel.sharding, 2)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
