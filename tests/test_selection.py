import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import strategies
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from benchmarks.communication import collectives
from cram_jax import compress, fake_quant, keep_largest, n_m, top_k

ARRAYS = st.tuples(
    st.sampled_from(strategies.DTYPES), st.sampled_from([strategies.SHAPES, ((9,), ())])
).flatmap(lambda drawn: st.tuples(*(strategies.arrays(s, drawn[0]) for s in drawn[1])))


def assert_agrees(arrays, k):
    masks = keep_largest(arrays, k)
    for mask, expected in zip(masks, references.keep_largest(arrays, k), strict=True):
        np.testing.assert_array_equal(mask, expected)


@given(ARRAYS, st.integers(-2, 120))
def test_agrees_with_a_stable_sort(arrays, k):
    assert_agrees(arrays, k)


@given(ARRAYS, st.integers(-2, 120))
def test_keeps_exactly_k(arrays, k):
    kept = sum(int(mask.sum()) for mask in keep_largest(arrays, k))
    assert kept == min(max(k, 0), sum(array.size for array in arrays))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("k", [0, 1, 17, 999, 1000])
def test_bit_patterns_of_every_kind(dtype, k):
    info = jnp.finfo(dtype)
    values = np.random.default_rng(0).choice(
        [
            0,
            1,
            float(info.max),
            float(info.tiny),
            float(info.smallest_subnormal),
            np.inf,
        ],
        size=1000,
    ) * np.random.default_rng(1).choice([-1, 1], size=1000)
    assert_agrees([jnp.asarray(values, dtype)], k)


def test_a_k_beyond_int32_keeps_all():
    with jax.enable_x64(True):
        for k, kept in ((2**40, 3), (-(2**40), 0)):
            assert int(keep_largest([jnp.ones(3)], jnp.int64(k))[0].sum()) == kept
    assert keep_largest([jnp.ones(3)], 2**40)[0].all()
    assert not keep_largest([jnp.ones(3)], -(2**40))[0].any()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32])
def test_a_k_of_a_narrow_type_counts_among_many(dtype):
    (mask,) = keep_largest([jnp.arange(1000.0)], jnp.asarray(5, dtype))
    np.testing.assert_array_equal(np.flatnonzero(mask), range(995, 1000))


@pytest.mark.parametrize("bits", [0x7FFFFFF8, 0x7FFFFFFE, 0x7FFFFFFF])
def test_the_largest_bit_patterns_do_not_wrap_around(bits):
    values = np.full(9, bits, np.int32)
    values[3] = 0x7FFFFFFF
    (mask,) = keep_largest([jnp.asarray(values.view(np.float32))], 4)
    first = [0, 1, 2, 3]
    np.testing.assert_array_equal(np.flatnonzero(mask), first)


@pytest.mark.parametrize("value", [0.0, 1.0, np.inf, np.nan])
def test_equal_entries_are_kept_from_the_front(value):
    masks = keep_largest([jnp.full((3, 5), value), jnp.full(4, -value)], 16)
    np.testing.assert_array_equal(masks[0], np.ones((3, 5), bool))
    np.testing.assert_array_equal(masks[1], [True, False, False, False])


def test_nan_is_larger_than_infinity():
    (mask,) = keep_largest([jnp.array([np.inf, 1.0, np.nan, -np.inf])], 2)
    np.testing.assert_array_equal(mask, [True, False, True, False])


def test_by_value_every_nan_is_the_same_and_the_largest():
    bits = np.array([0x7F800000, 0xFFC00000, 0x7FC00000, 0x7FC00001], np.uint32)
    array = jax.lax.bitcast_convert_type(bits, np.float32)
    for k in range(4):
        (mask,) = keep_largest([array], k, signed=True)
        np.testing.assert_array_equal(mask, [False, k > 0, k > 1, k > 2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_too_small_for_a_normal_number_are_compared(dtype):
    bits = np.array([5, 1, 0, 3], f"uint{8 * jnp.dtype(dtype).itemsize}")
    array = jax.lax.bitcast_convert_type(bits, dtype)
    for signed in (False, True):
        (mask,) = keep_largest([array], 2, signed=signed)
        np.testing.assert_array_equal(mask, [True, False, False, True])


def test_float64_is_compared_in_full():
    with jax.enable_x64(True):
        values = 1 + np.random.default_rng(0).permutation(500) * 2.0**-52
        for k in (1, 77, 499):
            assert_agrees([jnp.asarray(values).reshape(20, 25)], k)


def test_different_dtypes_are_compared_in_their_common_one():
    # 1.0009766 is float16's; bfloat16 has 1.0 and 1.0078125 around it.
    arrays = [
        jnp.array([1.0, 1.0078125], jnp.bfloat16),
        jnp.array([1.001], jnp.float16),
    ]
    masks = keep_largest(arrays, 2)
    np.testing.assert_array_equal(masks[0], [False, True])
    np.testing.assert_array_equal(masks[1], [True])


@pytest.mark.parametrize("narrow", ["bfloat16", "float16", "float8_e4m3fn"])
def test_different_dtypes_need_no_implicit_promotion(narrow):
    arrays = [jnp.array([0.5, -3.0], narrow), jnp.array([1.5, 3.0])]
    with jax.numpy_dtype_promotion("strict"):
        masks = keep_largest(arrays, jnp.uint8(2))
    np.testing.assert_array_equal(np.stack(masks), [[False, True], [False, True]])


def test_large_arrays():
    array = np.random.default_rng(0).standard_normal(200_003).astype(np.float32)
    for k in (1, 20_000, 199_999):
        assert_agrees([jnp.asarray(array), jnp.asarray(array[:7])], k)


def test_empty_and_scalar_arrays():
    assert keep_largest([], 3) == ()
    masks = keep_largest([jnp.zeros((0, 4)), jnp.array(2.0), jnp.array([3.0])], 1)
    assert [mask.shape for mask in masks] == [(0, 4), (), (1,)]
    assert [bool(mask.any()) for mask in masks] == [False, False, True]


def test_a_new_k_does_not_recompile():
    array, traces = jnp.arange(50.0), 0

    @jax.jit
    def kept(k):
        nonlocal traces
        traces += 1
        return keep_largest([array], k)[0].sum()

    assert [int(kept(jnp.int32(k))) for k in (0, 3, 50)] == [0, 3, 50]
    assert traces == 1


def test_vmap_and_control_flow():
    arrays = jax.random.normal(jax.random.key(0), (4, 30))
    ks = jnp.array([0, 3, 15, 30])
    together = jax.vmap(lambda x, k: keep_largest([x], k)[0])(arrays, ks)
    scanned = jax.lax.map(lambda xk: keep_largest([xk[0]], xk[1])[0], (arrays, ks))
    for array, k, one, other in zip(arrays, ks, together, scanned, strict=True):
        (expected,) = references.keep_largest([array], int(k))
        np.testing.assert_array_equal(one, expected)
        np.testing.assert_array_equal(other, expected)


SPECS = [("a", None), (None, "b"), ("a", "b"), (("a", "b"), None), (None, ("b", "a"))]


@pytest.mark.several_devices
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_have_the_masks_of_one_device(axis_type, spec):
    # Whole numbers, so that ties straddle the shards.
    values = jnp.round(3 * jax.random.normal(jax.random.key(0), (16, 24)))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type, axis_type))
    sharded = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
    whole = jax.device_put(values[:5, :3], NamedSharding(mesh, PartitionSpec()))
    for k in (1, 40, 200):
        masks = keep_largest([sharded, whole], k)
        expected = references.keep_largest([values, values[:5, :3]], k)
        for mask, reference in zip(masks, expected, strict=True):
            np.testing.assert_array_equal(mask, reference)
        assert masks[0].sharding.is_equivalent_to(sharded.sharding, 2)


def test_explicit_axes_on_one_device():
    """Arrays that are said to be sharded may not be concatenated, even there."""
    values = jnp.round(3 * jax.random.normal(jax.random.key(0), (16, 24)))
    mesh = jax.make_mesh(
        (1,), ("a",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1]
    )
    put = functools.partial(jax.device_put, values)
    arrays = [
        put(NamedSharding(mesh, PartitionSpec(*s))) for s in [("a",), (None, "a")]
    ]
    masks = keep_largest(arrays, 100)
    expected = references.keep_largest([values, values], 100)
    for array, mask, reference in zip(arrays, masks, expected, strict=True):
        np.testing.assert_array_equal(mask, reference)
        assert jax.typeof(mask).sharding == jax.typeof(array).sharding


@pytest.mark.several_devices
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_devices_exchange_only_counts(axis_type, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type, axis_type))
    leaves = [
        jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        for shape in [(1024, 512), (64, 4096)]
    ]
    compiled = jax.jit(lambda *arrays: keep_largest(arrays, 1000)).lower(*leaves)
    found = collectives(compiled.compile())
    assert {operation for operation, _ in found} == {"all-reduce"}
    # Of each array seven counts in the search for the threshold, three in that for the
    # ties; arrays that are cut along both axes are summed along one after the other.
    axes = sum(names is not None for names in spec)
    assert sorted(size for _, size in found) == [24] * axes + [56] * axes


@pytest.mark.several_devices
def test_a_program_is_lowered_and_exported_for_devices_that_are_not_there():
    mesh = AbstractMesh((16, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    array = jax.ShapeDtypeStruct((64, 6), jnp.float32, sharding=sharding)
    select = jax.jit(lambda x: keep_largest([x], 5)[0])
    for platform in ("cpu", "cuda", "tpu"):
        lowered = select.trace(array).lower(lowering_platforms=(platform,))
        assert "all-gather" not in lowered.as_text()

    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    values = jnp.round(3 * jax.random.normal(jax.random.key(0), (64, 6)))
    sharded = jax.device_put(values, sharding)
    exported = jax.export.export(select, platforms=("cpu", "cuda", "tpu"))(sharded)
    loaded = jax.export.deserialize(exported.serialize())
    (expected,) = references.keep_largest([values], 5)
    np.testing.assert_array_equal(jax.jit(loaded.call)(sharded), expected)


@pytest.mark.several_devices
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_any_number_of_devices_gives_the_same_masks(devices):
    """Of several arrays of each shape, full of ties, and on every device alike."""
    shapes = [(8, 4), (16,), (8, 4), (4, 2, 8), (16,)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    values = [
        jnp.round(jax.random.normal(key, shape))
        for key, shape in zip(keys, shapes, strict=True)
    ]
    mesh = jax.make_mesh(
        (devices,), ("a",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    specs = [PartitionSpec("a"), PartitionSpec(None, None, "a"), PartitionSpec()]
    sharded = [
        jax.device_put(value, NamedSharding(mesh, specs[which]))
        for value, which in zip(values, (0, 0, 0, 1, 0), strict=True)
    ]
    whole = NamedSharding(mesh, PartitionSpec())
    select = jax.jit(keep_largest, out_shardings=whole)
    for k in (0, 1, 50, 100, 160):
        expected = references.keep_largest(values, k)
        for mask, reference in zip(select(sharded, k), expected, strict=True):
            for shard in mask.addressable_shards:
                np.testing.assert_array_equal(shard.data, reference)


@pytest.mark.several_devices
def test_under_pmap_each_device_selects_in_what_it_holds():
    values = jax.random.normal(jax.random.key(0), (8, 30))
    masks = jax.pmap(lambda x: keep_largest([x], 4)[0])(values)
    for row, mask in zip(values, masks, strict=True):
        np.testing.assert_array_equal(mask, references.keep_largest([row], 4)[0])


@pytest.mark.several_devices
@pytest.mark.parametrize("check_vma", [True, False])
def test_under_shard_map_each_device_selects_in_what_it_holds(check_vma):
    values = jax.random.normal(jax.random.key(0), (8, 30))
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("a")
    select = functools.partial(keep_largest, k=4)
    masks = jax.shard_map(
        lambda x: select([x])[0],
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=check_vma,
    )(values)
    for row, mask in zip(values, masks, strict=True):
        np.testing.assert_array_equal(mask, references.keep_largest([row], 4)[0])


def test_more_entries_than_int32_holds():
    huge = jax.ShapeDtypeStruct((2**31 + 8,), jnp.bfloat16)
    with jax.enable_x64(True):
        program = jax.make_jaxpr(lambda x: keep_largest([x], 2**31 + 1))(huge)
    assert program.out_avals[0].shape == huge.shape
    assert "i64[1,7]" in str(program)  # seven counts of one array


def test_integers_are_refused():
    with pytest.raises(
        TypeError, match=r"arrays\[1\] has dtype int32, expected a float"
    ):
        keep_largest([jnp.ones(2), jnp.ones(2, jnp.int32)], 1)


@pytest.mark.parametrize("k", [0.5, jnp.array(2.0), True, jnp.array([1, 2])])
def test_a_k_that_is_no_integer_is_refused(k):
    with pytest.raises(TypeError, match="k must be an integer scalar, got"):
        keep_largest([jnp.ones(3)], k)


def test_too_many_entries_for_int32_are_refused():
    huge = jax.ShapeDtypeStruct((2**31,), jnp.float32)
    with pytest.raises(
        ValueError, match=r"arrays hold 2147483648 entries, expected at"
    ):
        jax.eval_shape(lambda x: keep_largest([x], 1), huge)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits_are_compared(dtype):
    row = jnp.array([[1.0, -2.0], [-4.0, 0.5]], dtype)
    (expected,) = references.keep_largest([np.asarray(row, np.float32)], 2)
    np.testing.assert_array_equal(keep_largest([row], 2)[0], expected)
    for options in ({}, {"block": (1, 1)}, {"scale": {"w": 1.0}}):
        values, masks = compress({"w": row}, top_k(0.5, **options))
        np.testing.assert_array_equal(masks["w"], expected)
        assert values["w"].dtype == dtype
    with pytest.raises(TypeError, match=r"\['w'\] has dtype float8.*, which is"):
        compress({"w": row}, fake_quant(4))


@pytest.mark.parametrize("dtype", ["float4_e2m1fn", "float8_e8m0fnu"])
def test_dtypes_without_magnitudes_in_their_bits_are_refused(dtype):
    row = jnp.ones((2, 2), dtype)
    message = f"has dtype {dtype}, expected a floating dtype of 8 bits or more with a"
    with pytest.raises(TypeError, match=message):
        keep_largest([row], 2)
    for projector in (top_k(0.5), n_m(1, 2), fake_quant(4)):
        with pytest.raises(TypeError, match=r"params\['w'\] " + message):
            compress({"w": row}, projector)
