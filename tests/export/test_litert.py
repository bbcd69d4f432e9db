"""LiteRT files, converted from jax.export and run by the LiteRT interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax import compress, fake_quant
from cram_jax.export import check_parity, run_litert, to_litert

for module in ("litert_converter", "ai_edge_litert", "ai_edge_quantizer"):
    pytest.importorskip(module, reason="needs the extra litert")


@pytest.fixture(scope="module")
def network():
    """Parameters, a function of them and two inputs, and inputs."""
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": jnp.asarray(rng.standard_normal((3, 3, 3, 32)) / 5)},
        "hidden": {"kernel": jnp.asarray(rng.standard_normal((32, 64)) / 6)},
        "head": {"kernel": jnp.asarray(rng.standard_normal((64, 10)) / 8)},
    }
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def apply(params, images, shift):
        x = jax.lax.conv_general_dilated(
            images,
            params["conv"]["kernel"],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x).mean((1, 2)) + shift
        x = jax.nn.relu(x @ params["hidden"]["kernel"])
        return x @ params["head"]["kernel"], x

    inputs = (
        rng.standard_normal((4, 8, 8, 3)).astype(np.float32),
        rng.standard_normal((4, 1)).astype(np.float32),
    )
    return params, apply, inputs


@pytest.mark.parametrize(
    ("weights", "projector", "tolerance"),
    [
        ("float32", None, 1e-6),
        # What is left is the rounding of activations while it runs.
        ("int8", fake_quant(8), 0.02),
        ("int4", fake_quant(4), 0.02),
        ("int4 in blocks", fake_quant(4, block=32, scale="bfloat16"), 0.02),
    ],
)
def test_the_interpreter_gives_jax_s_numbers(
    network, tmp_path, weights, projector, tolerance
):
    params, apply, inputs = network
    if projector is not None:
        params = compress(params, projector).params
    for name in ("one.tflite", "two.tflite"):
        to_litert(
            lambda *x: apply(params, *x),
            inputs,
            tmp_path / name,
            weights=weights,
            input_names=["images", "shift"],
            output_names=["logits", "features"],
        )
    content = (tmp_path / "one.tflite").read_bytes()
    assert content == (tmp_path / "two.tflite").read_bytes()
    assert b"images" in content
    got = run_litert(tmp_path / "one.tflite")(*inputs)
    check_parity(got, apply(params, *inputs), tolerance)


def test_blocks_are_those_that_the_quantiser_finds():
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor

    kernel = np.random.default_rng(0).standard_normal((96, 8)).astype(np.float32)
    projector = fake_quant(4, block=32, scale="bfloat16")
    (rounded,) = compress([jnp.asarray(kernel)], projector).params
    split = np.asarray(rounded).T.reshape(8, 3, 32)
    _, scale = uniform_quantize_tensor.tensor_zp_scale_from_min_max(
        split.min(-1),
        split.max(-1),
        4,
        True,
        qtyping.QuantGranularity.BLOCKWISE_32,
    )
    integers = np.rint(split / scale[..., None])
    held = (integers * scale[..., None]).astype(np.float32)
    np.testing.assert_array_equal(held, split)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int2"}, "weights must be 'float32', .*, got 'int2'"),
        ({"input_names": ["a"]}, r"input_names must be 2 different names, got \['a'\]"),
        ({"output_names": ["a", "a"]}, "output_names must be 2 different names"),
    ],
)
def test_options_that_do_not_fit_are_refused(network, tmp_path, options, message):
    params, apply, inputs = network
    path = tmp_path / "network.tflite"
    with pytest.raises(ValueError, match=message):
        to_litert(lambda *x: apply(params, *x), inputs, path, **options)
    assert not path.exists()


def test_an_operation_without_a_form_is_one_line(tmp_path):
    path = tmp_path / "network.tflite"
    with pytest.raises(ValueError, match="LiteRT has no form for this function"):
        to_litert(lambda x: jnp.linalg.qr(x)[0], [np.eye(3, dtype=np.float32)], path)
    assert not path.exists()
