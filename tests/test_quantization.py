import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import strategies
from hypothesis import given
from hypothesis import strategies as st

from cram_jax import compress, fake_quant, top_k

pytestmark = pytest.mark.usefixtures("quick_compilation")

BITS = st.integers(2, 8)

# One program instead of one for each operation.
compressed = jax.jit(compress, static_argnames="projector")

OPTIONS = [
    {"symmetric": symmetric, "per": per}
    for symmetric in (True, False)
    for per in ("channel", "tensor")
]


@pytest.mark.parametrize("options", OPTIONS)
@given(st.sampled_from(strategies.SHAPES).flatmap(strategies.arrays), BITS)
def test_fake_quant_agrees_with_float64(options, kernel, bits):
    (rounded,) = compress([kernel], fake_quant(bits, **options)).params
    values = np.asarray(kernel, np.float64)
    expected = references.fake_quant(values, bits, **options)
    axes = tuple(range(values.ndim - 1)) if options["per"] == "channel" else None
    smallest = np.minimum(values.min(axes, keepdims=True), 0)
    largest = np.maximum(values.max(axes, keepdims=True), 0)
    if options["symmetric"]:
        level = np.maximum(-smallest, largest) / (2 ** (bits - 1) - 1)
        at_zero = smallest * 0
    else:
        level = (largest - smallest) / (2**bits - 1)
        at_zero = smallest / np.where(level == 0, 1, level)
    difference = np.abs(np.asarray(rounded, np.float64) - expected)
    # Where the ratio is a half, float32 may round to the other side: one level.
    ratio = np.abs(values) / np.where(level == 0, 1, level)
    is_half = np.abs(ratio % 1 - 0.5) < 1e-4
    is_half |= np.abs(np.abs(at_zero) % 1 - 0.5) < 1e-4
    assert (difference <= np.where(is_half, 1.001, 1e-4) * level).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tails", ["normal", "student", "uniform", "skewed"])
def test_least_squares_is_as_good_as_a_fine_search(bits, symmetric, tails):
    rng = np.random.default_rng(0)
    kernel = {
        "normal": lambda: rng.standard_normal((400, 3)),
        "student": lambda: rng.standard_t(3, (400, 3)),
        "uniform": lambda: rng.uniform(-1, 1, (400, 3)),
        "skewed": lambda: rng.exponential(1, (400, 3)),
    }[tails]().astype(np.float32)
    projector = fake_quant(bits, symmetric=symmetric, clip="least_squares")
    (rounded,) = compressed([jnp.asarray(kernel)], projector).params
    plain = fake_quant(bits, symmetric=symmetric)
    (unclipped,) = compressed([jnp.asarray(kernel)], plain).params
    for channel in range(kernel.shape[1]):
        values = kernel[:, channel].astype(np.float64)
        best = references.least_squares_error(
            values, bits, symmetric, np.linspace(0.02, 1, 1000)
        )
        assert len(np.unique(rounded[:, channel])) <= 2**bits - symmetric
        error = np.sum((np.asarray(rounded)[:, channel] - values) ** 2)
        without = np.sum((np.asarray(unclipped)[:, channel] - values) ** 2)
        assert error <= (1.05 if bits <= 4 else 1.1) * best
        assert error <= without * (1 + 1e-6)
    if bits <= 4 and tails != "uniform":
        assert jnp.sum((rounded - kernel) ** 2) < 0.9 * jnp.sum(
            (unclipped - kernel) ** 2
        )


def test_least_squares_ends_at_the_best_scale_for_its_levels():
    kernel = np.random.default_rng(0).standard_normal((400, 3)).astype(np.float32)
    projector = fake_quant(2, clip="least_squares")
    (rounded,) = compressed([jnp.asarray(kernel)], projector).params
    levels = np.asarray(rounded, np.float64)
    best = (levels * kernel).sum(0) / (levels**2).sum(0)
    np.testing.assert_allclose(best, 1, rtol=1e-5)


# A layout and bits for each form instead of all of them, because each compiles.
FORMS = [
    (options | {"clip": clip}, 2 + i % 3, strategies.LAYOUTS[i % 5])
    for i, (clip, options) in enumerate(
        itertools.product(["max", "least_squares"], OPTIONS)
    )
]


@pytest.mark.parametrize(("options", "bits", "layout"), FORMS)
@given(data=st.data())
def test_every_form_keeps_zeros_dtypes_and_few_levels(options, bits, layout, data):
    symmetric, per = options["symmetric"], options["per"]
    params = data.draw(strategies.trees([layout]))
    projection = compressed(params, fake_quant(bits, **options))
    for before, after, mask in zip(
        *map(jax.tree.leaves, (params, *projection)), strict=True
    ):
        assert after.dtype == before.dtype
        assert np.isfinite(np.float64(after)).all()
        assert (np.asarray(after)[np.asarray(before) == 0] == 0).all()
        assert mask.all()
        if before.ndim >= 2:
            parts = np.moveaxis(np.asarray(after), -1, 0)
            parts = parts if per == "channel" else [parts]
            levels = 2**bits - (1 if symmetric else 0)
            assert all(len(np.unique(part)) <= levels for part in parts)


@pytest.mark.parametrize("exponent", [-100, 100, 121])
def test_least_squares_suits_weights_of_any_magnitude(exponent):
    kernel = np.random.default_rng(0).standard_normal((48, 3)).astype(np.float32)
    projector = fake_quant(3, clip="least_squares")
    # A power of two changes no digit.
    (expected,) = compressed([jnp.asarray(kernel)], projector).params
    (rounded,) = compressed([jnp.ldexp(kernel, exponent)], projector).params
    np.testing.assert_array_equal(jnp.ldexp(rounded, -exponent), expected)


def test_least_squares_of_float32_does_not_depend_on_x64():
    kernel = jax.random.normal(jax.random.key(0), (40, 2), jnp.float32)
    projector = fake_quant(3, clip="least_squares")
    (expected,) = compressed([kernel], projector).params
    with jax.enable_x64(True):
        (rounded,) = compressed([kernel], projector).params
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, expected, rtol=1e-6)


def test_least_squares_compiles_once_outside_of_jit(caplog):
    kernel = jax.random.normal(jax.random.key(0), (6, 2))

    def programs():
        caplog.clear()
        with jax.log_compiles():
            # Another projector of the same value.
            compress([kernel], fake_quant(3, clip="least_squares"))
        return sum("Finished XLA compilation" in text for text in caplog.messages)

    programs()
    assert programs() == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_dtype_or_rank_is_promoted_silently(dtype):
    kernel = jax.ShapeDtypeStruct((16, 8), dtype)
    projectors = [
        fake_quant(4),
        fake_quant(4, clip="least_squares"),
        fake_quant(4, clip="least_squares", block=3),
        top_k(0.5, block=(2, 2)),
        top_k(0.5, scale=lambda path, leaf: 2.0),
    ]
    for projector in projectors:

        def loss(kernel, projector=projector):
            return jnp.sum(compress([kernel], projector).params[0])

        with (
            jax.numpy_dtype_promotion("strict"),
            jax.numpy_rank_promotion("raise"),
        ):
            assert jax.eval_shape(jax.grad(loss), kernel) == kernel


def test_asymmetric_suits_weights_that_lean_to_a_side():
    kernel = jnp.linspace(0, 1, 64).reshape(64, 1) ** 2
    errors = [
        float(jnp.sum((compress([kernel], projector).params[0] - kernel) ** 2))
        for projector in (fake_quant(4), fake_quant(4, symmetric=False))
    ]
    assert errors[1] < 0.3 * errors[0]


@given(strategies.trees(), BITS)
def test_fake_quant_has_few_levels_in_a_channel(params, bits):
    projection = compress(params, fake_quant(bits))
    np.testing.assert_array_equal(projection.params["bias"], params["bias"])
    for leaf, mask in zip(*map(jax.tree.leaves, projection), strict=True):
        assert mask.all()
        if leaf.ndim >= 2:
            for channel in np.moveaxis(np.asarray(leaf), -1, 0):
                assert len(np.unique(channel)) <= 2**bits - 1


@given(strategies.trees(), BITS)
def test_fake_quant_is_symmetric_and_keeps_zeros(params, bits):
    rounded = compress(params, fake_quant(bits)).params
    opposite = compress(jax.tree.map(jnp.negative, params), fake_quant(bits)).params
    for before, after, other in zip(
        *map(jax.tree.leaves, (params, rounded, opposite)), strict=True
    ):
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, -other)
        assert (np.asarray(after)[np.asarray(before) == 0] == 0).all()


@given(strategies.trees(), BITS)
def test_fake_quant_twice_is_fake_quant_once(params, bits):
    once = compress(params, fake_quant(bits)).params
    twice = compress(once, fake_quant(bits)).params
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        # The second scale is the rounded product of the first: some units in the last
        # place of the dtype, never another level.
        epsilon = float(jnp.finfo(a.dtype).eps)
        np.testing.assert_allclose(
            np.float64(b), np.float64(a), rtol=4 * epsilon, atol=0
        )


def test_the_gradient_passes_straight_through():
    kernel = jnp.array([[0.1, 2.0], [-0.7, 0.3]])
    weights = jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def loss(kernel):
        return jnp.sum(weights * compress([kernel], fake_quant(3)).params[0])

    np.testing.assert_array_equal(jax.grad(loss)(kernel), weights)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("float16", 2), ("float16", 8), ("bfloat16", 8), ("float32", 8)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_at_the_end_of_the_range_stay_finite(dtype, symmetric, bits):
    limit = float(jnp.finfo(dtype).max)
    kernel = jnp.asarray([[limit, -0.9 * limit], [-0.92 * limit, 0.3 * limit]], dtype)
    (rounded,) = compress([kernel], fake_quant(bits, symmetric=symmetric)).params
    expected = references.fake_quant(np.asarray(kernel, np.float64), bits, symmetric)
    expected = np.clip(expected, -limit, limit)
    np.testing.assert_allclose(
        np.asarray(rounded, np.float64), expected, rtol=2 * float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize("clip", ["max", "least_squares"])
def test_a_leaf_without_entries_stays_so(clip):
    params = {"a": jnp.ones((0, 3)), "b": jnp.ones((3, 0)), "c": jnp.ones((4, 4))}
    rounded = compress(params, fake_quant(4, symmetric=False, clip=clip)).params
    assert [leaf.shape for leaf in jax.tree.leaves(rounded)] == [(0, 3), (3, 0), (4, 4)]


def test_a_leaf_of_one_dimension_has_one_scale():
    (rounded,) = compress(
        [jnp.array([1.0, 0.4, -3.0])], fake_quant(2, where=lambda path, leaf: True)
    ).params
    np.testing.assert_array_equal(rounded, [0, 0, -3])


@pytest.mark.parametrize("bits", [1, 0, -4, 17])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be between 2 and 16, got {bits}"):
        fake_quant(bits)


@pytest.mark.parametrize("bits", [4.0, "4", True])
def test_bits_must_be_an_integer(bits):
    with pytest.raises(TypeError, match="bits must be an integer, got"):
        fake_quant(bits)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        ({"per": "row"}, ValueError, "per must be 'channel' or 'tensor', got 'row'"),
        ({"clip": None}, ValueError, "clip must be 'max' or 'least_squares', got None"),
    ],
)
def test_unknown_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        fake_quant(4, **options)


def test_the_label_names_what_is_not_the_default():
    assert repr(fake_quant(4)) == "fake_quant(4)"
    projector = fake_quant(4, symmetric=False, per="tensor", clip="least_squares")
    expected = "fake_quant(4, symmetric=False, per='tensor', clip='least_squares')"
    assert repr(projector) == expected


def test_integer_parameters_are_refused():
    with pytest.raises(TypeError, match="'0'.*int32, expected a floating dtype"):
        fake_quant(4).init([jnp.ones((4, 4), jnp.int32)])
