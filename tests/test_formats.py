"""Projectors round to exactly what the formats of engines hold."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cram_jax import (
    Axes,
    compose,
    compress,
    fake_quant,
    mxfp4,
    nested,
    nvfp4,
    one_of,
    sparsity_report,
    top_k,
)
from cram_jax.quantization.floats import round_e2m1, round_e4m3, round_scale

pytestmark = pytest.mark.usefixtures("quick_compilation")

FORMATS = {
    "MatMulNBits": fake_quant(4, block=32, scale="float16"),
    "Q4_0": fake_quant(4, block=32, scale="float16", full_range=True),
    "Q8_0": fake_quant(8, block=32, scale="float16"),
    "LiteRT": fake_quant(4, block=32, scale="bfloat16"),
    "zero points": fake_quant(3, block=5, symmetric=False),
    "MXFP4": mxfp4(),
    "NVFP4": nvfp4(),
    "nested": nested(4),
}


def make_kernel(*shape):
    """Weights of many magnitudes, with a block of zeros and one of tiny numbers."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(shape) * np.exp(rng.normal(size=(1, shape[-1])))
    kernel[:32, 0] = 0
    kernel[32:64, 1] *= 1e-5
    return kernel.astype(np.float32)


@jax.jit
def in_every_format(params):
    return {name: compress(params, p) for name, p in FORMATS.items()}


@jax.jit
def each_in_its_format(kernels):
    return {name: compress(kernels[name], p).params for name, p in FORMATS.items()}


@pytest.fixture(scope="module")
def kernel():
    return make_kernel(128, 6)


@pytest.fixture(scope="module")
def rounded(kernel):
    """The kernel in every format, by one compiled program."""
    kernels = dict.fromkeys(FORMATS, jnp.asarray(kernel))
    return jax.tree.map(np.asarray, each_in_its_format(kernels))


def blocks(kernel, size):
    """(outputs, blocks, size)."""
    return kernel.T.reshape(kernel.shape[1], -1, size)


def restored(integers, scale):
    """A kernel from (outputs, blocks, size) integers and a scale for each block."""
    values = integers.astype(np.float32) * scale.astype(np.float32)[..., None]
    return values.reshape(len(values), -1).T


def by_formula(kernel, highest, dtype):
    split = blocks(kernel, 32)
    scale = (np.abs(split).max(-1) / np.float32(highest)).astype(dtype)
    wide = scale.astype(np.float32)[..., None]
    integers = np.rint(split / np.where(wide > 0, wide, 1))
    return restored(np.clip(integers, -highest, highest), scale)


@pytest.mark.parametrize(
    ("name", "highest", "dtype"),
    [
        ("MatMulNBits", 7, np.float16),
        ("Q8_0", 127, np.float16),
        ("LiteRT", 7, ml_dtypes.bfloat16),
    ],
)
def test_symmetric_blocks_are_those_of_the_formula(
    kernel, rounded, name, highest, dtype
):
    np.testing.assert_array_equal(rounded[name], by_formula(kernel, highest, dtype))


def in_gguf(rows, kind):
    """Rows as the file holds them: a float16 scale, then the integers of a block."""
    split = rows.reshape(len(rows), -1, 32)
    largest = np.take_along_axis(split, np.abs(split).argmax(-1)[..., None], -1)
    divisor = -8 if kind == "Q4_0" else 127 * np.sign(largest)
    scale = (largest / np.where(divisor == 0, 1, divisor)).astype(np.float16)
    wide = scale.astype(np.float32)
    integers = np.rint(split / np.where(wide == 0, 1, wide)).astype(np.int8)
    if kind == "Q4_0":
        nibbles = (integers + 8).astype(np.uint8)
        integers = nibbles[..., :16] | nibbles[..., 16:] << 4
    parts = scale.view(np.uint8), integers.view(np.uint8)
    return np.concatenate(parts, -1).reshape(len(rows), -1)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "MXFP4"])
def test_gguf_holds_them(rounded, name):
    quants = pytest.importorskip("gguf.quants", reason="needs the package gguf")
    kind = quants.GGMLQuantizationType[name]
    rows = np.ascontiguousarray(rounded[name].T)
    held = quants.quantize(rows, kind) if name == "MXFP4" else in_gguf(rows, name)
    np.testing.assert_array_equal(quants.dequantize(held, kind), rows)


def test_full_range_uses_all_levels(kernel, rounded):
    split = blocks(rounded["Q4_0"], 32)
    for row in split.reshape(-1, 32):
        if row.any():
            scale = row[np.abs(row).argmax()] / np.float32(-8)
            integers = row / scale
            np.testing.assert_array_equal(integers, np.rint(integers))
            assert integers.min() == -8
            assert integers.max() <= 7
    errors = [np.sum((rounded[n] - kernel) ** 2) for n in ("Q4_0", "MatMulNBits")]
    assert errors[0] < errors[1]


def test_zero_points_make_the_most_of_a_side():
    kernel = np.abs(make_kernel(20, 3))
    projector = fake_quant(3, block=5, symmetric=False)
    (got,) = compress([jnp.asarray(kernel)], projector).params
    for ours, theirs in zip(
        blocks(np.asarray(got), 5).reshape(-1, 5),
        blocks(kernel, 5).reshape(-1, 5),
        strict=True,
    ):
        scale = theirs.max() / 7
        expected = scale * np.rint(theirs / scale) if scale else theirs
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_mxfp4_agrees_with_ml_dtypes(kernel, rounded):
    split = blocks(kernel, 32).astype(np.float64)
    largest = np.abs(split).max(-1, keepdims=True)
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 1))) - 2
    exponent = np.where(largest > 0, exponent, 0)
    scale = (2.0**exponent).astype(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    numbers = (split / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    expected = (numbers * scale).reshape(6, -1).T
    np.testing.assert_array_equal(rounded["MXFP4"], expected)


def test_nvfp4_agrees_with_ml_dtypes(kernel, rounded):
    split = blocks(kernel, 16)
    whole = np.abs(kernel).max() / np.float32(6 * 448)
    largest = np.abs(split).max(-1, keepdims=True)
    scale = (largest / np.float32(6) / whole).astype(ml_dtypes.float8_e4m3fn)
    scale = scale.astype(np.float32)
    divisor = np.where(scale > 0, scale * whole, 1)
    numbers = (split / divisor).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = (numbers * scale * whole).reshape(6, -1).T
    np.testing.assert_array_equal(rounded["NVFP4"], expected)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_block_that_is_not_finite_becomes_nan(value):
    kernel = jnp.ones((64, 2)).at[3, 0].set(value)
    (rounded,) = compress([kernel], mxfp4()).params
    assert jnp.isnan(rounded[:32, 0]).all()
    np.testing.assert_array_equal(rounded[32:, 0], 1)
    np.testing.assert_array_equal(rounded[:, 1], 1)


def test_float64_is_rounded_to_the_formats_without_a_warning(kernel):
    expected = compress([kernel], mxfp4()).params[0]
    with jax.enable_x64(True):
        (rounded,) = compress([kernel.astype(np.float64)], mxfp4()).params
    assert rounded.dtype == np.float64
    np.testing.assert_array_equal(rounded, expected)


def test_stacked_layers_are_rounded_one_by_one():
    layers = make_kernel(3 * 32, 4).reshape(3, 32, 4)
    layers *= np.float32([[[1]], [[50]], [[0.01]]])
    of_all, of_one = [Axes("stack", "input", "output")], [Axes("input", "output")]
    for make in (nvfp4, lambda axes: nested(4, axes=axes)):
        stacked = compress([layers], make(axes=of_all)).params[0]
        for layer, expected in zip(layers, stacked, strict=True):
            one = compress([layer], make(axes=of_one)).params[0]
            np.testing.assert_array_equal(one, expected)


@given(st.lists(st.floats(-7, 7, width=32), min_size=8, max_size=8))
def test_e2m1_is_the_nearest_half_to_even(values):
    values = np.float32([*values[:7], round(4 * values[7]) / 4])  # ties among them
    expected = values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(round_e2m1(jnp.asarray(values)), expected)


@given(st.lists(st.floats(0, 440, width=32), min_size=8, max_size=8))
def test_e4m3_is_the_nearest(values):
    values = np.float32(values) * np.float32([1] * 4 + [2**-12] * 4)
    expected = values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(round_e4m3(jnp.asarray(values)), expected)
    assert round_e4m3(jnp.float32(1e9)) == 448


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@given(st.lists(st.floats(0, 2.0**15, width=32), min_size=8, max_size=8))
def test_scales_are_the_nearest_small_ones_too(kind, values):
    # Float32 itself has denormal numbers below, which XLA takes for zero.
    values = np.float32(values) * np.float32([1] * 3 + [2**-20] * 3 + [2**-38] * 2)
    values[np.abs(values) < 2.0**-120] = 0
    expected = values.astype(jnp.dtype(kind)).astype(np.float32)
    rounded = jax.jit(round_scale, static_argnums=1)(values, kind)
    np.testing.assert_array_equal(rounded, expected)


def test_zero_stays_on_the_grid_if_the_scale_is_rounded_down():
    tiny = 2.0**-24  # the smallest float16
    kernel = jnp.array([[0], [-4.2 * tiny]])
    projector = fake_quant(2, symmetric=False, scale="float16")
    (rounded,) = compress([kernel], projector).params
    np.testing.assert_array_equal(rounded, [[0], [-3 * tiny]])


def test_float16_scales_stay_finite():
    assert round_scale(jnp.float32(1e9), "float16") == 65504


@pytest.mark.parametrize("of", [4, 8])
def test_the_widest_nested_is_fake_quant(kernel, of):
    for ours, theirs in zip(
        compress([jnp.asarray(kernel)], nested(of, of=of)).params,
        compress([jnp.asarray(kernel)], fake_quant(of)).params,
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def integers(kernel, bits):
    scale = np.abs(kernel).max(0) / (2 ** (bits - 1) - 1)
    return np.rint(kernel / np.where(scale > 0, scale, 1)).astype(int)


def test_leading_bits_are_the_smaller_models(kernel):
    cut = {
        bits: integers(
            np.asarray(compress([jnp.asarray(kernel)], nested(bits)).params[0]), bits
        )
        for bits in (8, 5, 4, 2)
    }
    for wide, narrow in ((8, 5), (8, 4), (8, 2), (5, 4), (4, 2)):
        magnitudes = np.abs(cut[wide]) >> (wide - narrow)
        np.testing.assert_array_equal(np.sign(cut[wide]) * magnitudes, cut[narrow])
    assert [np.abs(cut[bits]).max() for bits in cut] == [127, 15, 7, 1]


def test_projecting_twice_changes_nothing(rounded):
    for name, again in each_in_its_format(rounded).items():
        if name in ("zero points", "nested", "NVFP4"):  # scales are rounded as float32
            np.testing.assert_allclose(again, rounded[name], rtol=1e-6)
        else:
            np.testing.assert_array_equal(again, rounded[name], err_msg=name)


@given(strategies.trees(strategies.FEW_LAYOUTS))
def test_zeros_dtypes_and_masks_stay(params):
    for projection in in_every_format(params).values():
        for before, after, mask in zip(
            *map(jax.tree.leaves, (params, *projection)), strict=True
        ):
            assert after.dtype == before.dtype
            assert mask.all()
            assert np.isfinite(np.float32(after)).all()
            assert (np.asarray(after)[np.asarray(before) == 0] == 0).all()
            if before.ndim < 2:
                np.testing.assert_array_equal(after, before)


def test_gradients_pass_straight_through(kernel):
    weights = jnp.asarray(make_kernel(128, 6))

    @jax.jit
    @jax.grad
    def gradient(kernel):
        return sum(
            jnp.sum(weights * compress([kernel], projector).params[0])
            for projector in FORMATS.values()
        )

    expected = len(FORMATS) * np.float64(weights)
    np.testing.assert_allclose(gradient(jnp.asarray(kernel)), expected, rtol=1e-6)


def test_blocks_follow_the_axes(kernel):
    """The same numbers whichever way a kernel lies, and the last block may be short."""
    projector = fake_quant(4, block=32)
    (upright,) = compress([jnp.asarray(kernel[:100])], projector).params
    turned = fake_quant(4, block=32, axes=[Axes("output", "input")])
    (lying,) = compress([jnp.asarray(kernel[:100].T)], turned).params
    np.testing.assert_array_equal(lying.T, upright)
    table = fake_quant(4, block=32, axes=[Axes("lookup", "output")])
    (looked_up,) = compress([jnp.asarray(kernel[:100].T)], table).params
    np.testing.assert_array_equal(looked_up, lying)
    (short,) = compress([jnp.asarray(kernel[96:100])], projector).params
    np.testing.assert_array_equal(upright[96:], short)


def test_a_leaf_without_inputs_stays_and_is_reported():
    params = {"a": jnp.ones((4, 4)), "b": jnp.full((4, 4), 0.3)}
    axes = {"a": None, "b": Axes("output", "output")}
    for projector in (fake_quant(2, block=2, axes=axes), mxfp4(axes=axes)):
        projection = compress(params, projector)
        np.testing.assert_array_equal(projection.params["b"], params["b"])
        report = sparsity_report(*projection, projector)
        assert "it has no inputs" in str(report)


def test_they_compose_and_are_drawn():
    params = {"kernel": jnp.asarray(make_kernel(64, 4))}
    several = one_of(nested(8), nested(4), mxfp4(), FORMATS["Q4_0"])
    assert several == one_of(nested(8), nested(4), mxfp4(), FORMATS["Q4_0"])
    assert hash(several) == hash(one_of(*several.projectors))
    draw = jax.jit(lambda key: compress(params, several, key=key).params["kernel"])
    drawn = {np.asarray(draw(jax.random.key(seed))).tobytes() for seed in range(12)}
    assert len(drawn) == 4
    both = compress(params, compose(top_k(0.5), nvfp4()))
    assert (both.params["kernel"] == 0).mean() >= 0.5
    assert not both.masks["kernel"].all()


@pytest.mark.several_devices
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shards_round_as_one_device_does(kernel, rounded, axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(kernel, NamedSharding(mesh, P("x", "y")))
        together = in_every_format(sharded)
    for name, expected in rounded.items():
        np.testing.assert_array_equal(np.asarray(together[name].params), expected)


def test_they_print_as_they_were_written():
    assert [repr(projector) for projector in FORMATS.values()] == [
        "fake_quant(4, block=32, scale='float16')",
        "fake_quant(4, block=32, scale='float16', full_range=True)",
        "fake_quant(8, block=32, scale='float16')",
        "fake_quant(4, block=32, scale='bfloat16')",
        "fake_quant(3, symmetric=False, block=5)",
        "mxfp4()",
        "nvfp4()",
        "nested(4)",
    ]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fake_quant(4, block=0), ValueError, "block must be at least 1, got 0"),
        (lambda: fake_quant(4, block=2.0), TypeError, "block must be an integer"),
        (
            lambda: fake_quant(4, block=2, per="tensor"),
            ValueError,
            "per must be 'channel' with block=2, got 'tensor'",
        ),
        (
            lambda: fake_quant(4, scale="int8"),
            ValueError,
            "scale must be 'float32', 'float16' or 'bfloat16', got 'int8'",
        ),
        (
            lambda: fake_quant(4, full_range=True, symmetric=False),
            ValueError,
            "full_range=True needs symmetric=True and clip='max'",
        ),
        (lambda: fake_quant(4, full_range=1), TypeError, "full_range must be True or"),
        (lambda: nested(1), ValueError, "bits must be between 2 and 8, got 1"),
        (lambda: nested(5, of=4), ValueError, "bits must be between 2 and 4, got 5"),
        (lambda: nested(2, of=9), ValueError, "of must be between 2 and 8, got 9"),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
