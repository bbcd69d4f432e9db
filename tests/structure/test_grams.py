"""The products of inputs say what any change of a layer's weights does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax.structure import input_grams, multiply_adds

pytestmark = pytest.mark.usefixtures("quick_compilation")


def convolution(layout, **options):
    def apply(w, x):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)

    return apply


def scanned(w, x):
    return jax.lax.scan(lambda carry, layer: (carry, x @ layer), 0.0, w)[1]


def shared_by_steps(w, x):
    return jax.lax.scan(lambda carry, step: (carry, step @ w), 0.0, x)[1]


def nested(w, x):
    return jax.jit(jax.checkpoint(lambda w: jax.jit(jnp.matmul)(x, w)))(w)


# The function is linear in w. Its inputs, as (stacked, windows, inputs), come first in
# the order of axes that makes w a stack of matrices.
LINEAR = {
    "dense": (lambda w, x: x @ w, (5, 3), (4, 5), (0, 1), 0, 1),
    "of a transposed matrix": (lambda w, x: x @ w.T, (3, 5), (4, 5), (1, 0), 0, 1),
    "the matrix first": (
        lambda w, x: jnp.einsum("oi,bi->ob", w, x), (3, 5), (4, 5), (1, 0), 0, 1,
    ),
    "heads out": (
        lambda w, x: jnp.einsum("btd,dhe->bthe", x, w), (5, 2, 3), (2, 4, 5),
        (0, 1, 2), 0, 1,
    ),
    "heads in": (
        lambda w, x: jnp.einsum("bthe,hed->btd", x, w), (2, 3, 5), (2, 4, 2, 3),
        (0, 1, 2), 0, 2,
    ),
    "heads in, units first": (
        lambda w, x: jnp.einsum("bteh,hed->btd", x, w), (2, 3, 5), (2, 4, 3, 2),
        (0, 1, 2), 0, 2,
    ),
    "heads in, flattened": (
        lambda w, x: x.reshape(8, 6) @ w.reshape(6, 5), (2, 3, 5), (2, 4, 2, 3),
        (0, 1, 2), 0, 2,
    ),
    "convolution": (
        convolution(("NHWC", "HWIO", "NHWC"), window_strides=(2, 1), padding="SAME"),
        (3, 2, 2, 4), (2, 5, 6, 2), (0, 1, 2, 3), 0, 3,
    ),
    "convolution, outputs first": (
        convolution(
            ("NCHW", "OIHW", "NCHW"), window_strides=(1, 2),
            padding=((2, -1), (0, 1)), rhs_dilation=(1, 2),
        ),
        (4, 2, 3, 2), (2, 2, 5, 6), (2, 3, 1, 0), 0, 3,
    ),
    "transposed convolution": (
        convolution(
            ("NWC", "WIO", "NWC"), window_strides=(1,), padding=((2, 1),),
            lhs_dilation=(2,),
        ),
        (3, 2, 4), (2, 5, 2), (0, 1, 2), 0, 2,
    ),
    "experts": (
        lambda w, x: jnp.einsum("nbi,nio->nbo", x, w), (2, 5, 3), (2, 4, 5),
        (0, 1, 2), 1, 1,
    ),
    "experts inside": (
        lambda w, x: jnp.einsum("nbi,ino->nbo", x, w), (5, 2, 3), (2, 4, 5),
        (1, 0, 2), 1, 1,
    ),
    "stacked layers": (scanned, (2, 5, 3), (4, 5), (0, 1, 2), 1, 1),
    "shared by steps": (shared_by_steps, (5, 3), (6, 4, 5), (0, 1), 0, 1),
    "inside of calls": (nested, (5, 3), (4, 5), (0, 1), 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_the_products_give_the_norm_of_the_outputs(name):
    r"""||X W||^2 is the trace of W^T G W, for any W."""
    apply, of_weights, of_inputs, order, stacked, inputs = LINEAR[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=of_inputs).astype(np.float32)
    params = {"w": jnp.zeros(of_weights)}
    grams, left_out, axes = input_grams(lambda p, x: apply(p["w"], x), params, [x])
    assert not left_out
    kinds = "stack", "input", "output"
    roles = [role.replace("window", "input") for role in axes("w", None).roles]
    counts = stacked, inputs, len(order) - stacked - inputs
    expected = np.repeat(kinds, counts)
    assert [roles[axis] for axis in order] == expected.tolist()
    gram = grams["w"]
    for _ in range(2):
        w = rng.normal(size=of_weights).astype(np.float32)
        matrices = w.transpose(order)
        lead = matrices.shape[:stacked]
        size = int(np.prod(matrices.shape[stacked : stacked + inputs]))
        matrices = matrices.reshape(*lead, size, -1).astype(np.float64)
        assert gram.shape == (*lead, size, size)
        trace = np.sum(matrices * (np.float64(gram) @ matrices))
        outputs = np.asarray(jax.jit(apply)(w, x), np.float64)
        # float32 products of numbers of about 1.
        np.testing.assert_allclose(trace, np.sum(outputs**2), rtol=1e-5)


def network(params, x):
    hidden = jnp.tanh(x @ params["first"] + params["bias"])
    return hidden @ params["second"]


def test_sums_of_several_batches_are_those_of_numpy():
    rng = np.random.default_rng(1)
    shapes = {"bias": (4,), "first": (3, 4), "second": (4, 2)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params = jax.tree.map(jnp.float32, params)
    batches = [rng.normal(size=(n, 3)).astype(np.float32) for n in (5, 5, 2)]
    grams, left_out, _ = input_grams(network, params, batches)
    assert not left_out
    assert sorted(grams) == ["first", "second"]
    x = np.concatenate(batches).astype(np.float64)
    hidden = np.tanh(x @ params["first"] + params["bias"])
    np.testing.assert_allclose(grams["first"], x.T @ x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grams["second"], hidden.T @ hidden, rtol=1e-5, atol=1e-5)


def test_layers_in_a_scan_see_what_the_layers_before_make():
    rng = np.random.default_rng(2)
    layers = rng.normal(size=(3, 4, 4)).astype(np.float32)
    x = rng.normal(size=(6, 4)).astype(np.float32)

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[
            0
        ]

    grams, *_ = input_grams(apply, {"layers": layers}, [x])
    assert grams["layers"].shape == (3, 4, 4)
    for layer, gram in zip(layers, grams["layers"], strict=True):
        np.testing.assert_allclose(gram, x.T @ x, rtol=1e-4, atol=1e-5)
        x = np.tanh(x @ layer)


def test_half_precision_is_summed_in_float32():
    x = jnp.full((4096, 1), 1.0, jnp.bfloat16)  # bfloat16 would stop counting at 256
    grams, *_ = input_grams(
        lambda w, x: x @ w["w"], {"w": jnp.ones((1, 1), jnp.bfloat16)}, [x]
    )
    assert grams["w"].dtype == jnp.float32
    assert grams["w"].item() == 4096


KERNEL = jnp.ones((4, 4))

LEFT_OUT = {
    "it meets mul before a contraction": lambda w, x: x @ (2 * w),
    "it meets gather before a contraction": lambda w, x: w[jnp.int32(x[:, 0])] @ w.T,
    "it meets slice before a contraction": lambda w, x: x @ w[:, :2],
    "an axis of it is only partly summed over": lambda w, x: (
        jnp.tile(x, (1, 2)) @ w.reshape(8, 2)
    ),
    "it is multiplied with other parameters or constants": lambda w, x: x @ (w @ w),
    "it is summed over in two ways": lambda w, x: (x @ w) @ w.T,
    "it is the kernel of a grouped convolution": lambda w, x: (
        jax.lax.conv_general_dilated(
            x[:, None], w[:, None], (1,), "SAME", feature_group_count=1,
            batch_group_count=2,
        )
    ),
    "it meets while before a contraction": lambda w, x: jax.lax.while_loop(
        lambda x: x.sum() < 3, lambda x: x @ w, x
    ),
    "a loop carries it": lambda w, x: jax.lax.scan(
        lambda carry, _: (2 * carry, x @ carry), w, length=2
    )[1],
    "no contraction reads it": lambda w, x: x,
}  # fmt: skip


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_a_parameter_that_is_not_simply_multiplied_is_left_out(reason):
    def apply(params, x):
        return LEFT_OUT[reason](params["w"], x)

    grams, left_out, _ = input_grams(apply, {"w": KERNEL}, [jnp.ones((2, 4))])
    assert (grams, left_out) == ({}, {"w": reason})


def test_batches_without_examples_are_refused_unless_there_are_others():
    def apply(w, batch):
        return batch["scale"] * batch["x"] @ w

    w, some = jnp.ones((3, 2)), {"scale": 1.0, "x": jnp.ones((4, 3))}
    none = {"scale": 1.0, "x": jnp.ones((0, 3))}
    with pytest.raises(ValueError, match="batches must hold at least one example"):
        input_grams(apply, w, [none, none])
    together = input_grams(apply, w, [some, none]).grams[""]
    np.testing.assert_array_equal(together, np.full((3, 3), 4.0))


def test_no_batch_and_no_parameter_are_errors():
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        input_grams(network, {"w": KERNEL}, [])
    with pytest.raises(ValueError, match="params must have at least one array"):
        input_grams(network, {}, [KERNEL])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dense", 4 * 5 * 3),
        ("heads in, units first", 2 * 4 * 6 * 5),
        ("convolution", 2 * (3 * 6) * (3 * 2 * 2) * 4),
        ("experts", 2 * 4 * 5 * 3),
        ("stacked layers", 2 * 4 * 5 * 3),
        ("shared by steps", 6 * 4 * 5 * 3),
    ],
)
def test_multiply_adds_are_rows_times_inputs_times_outputs(name, count):
    apply, of_weights, of_inputs, *_ = LINEAR[name]
    counts = multiply_adds(
        lambda params, x: apply(params["w"], x),
        {"w": jax.ShapeDtypeStruct(of_weights, jnp.float32)},
        jax.ShapeDtypeStruct(of_inputs, jnp.float32),
    )
    assert counts == {"w": count}
