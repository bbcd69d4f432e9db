"""Core ML packages hold the network's weights, the zeros as zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax import compose, compress, fake_quant, identity, top_k
from cram_jax.export import coreml_weights, to_coreml

pytestmark = pytest.mark.filterwarnings("ignore")
for module in ("coremltools", "stablehlo_coreml"):
    pytest.importorskip(module, reason="needs the extra coreml")

SHAPES = {"conv": (3, 3, 32, 16), "hidden": (16, 256), "head": (256, 10)}


def make_params(projector):
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal(s, np.float32) for n, s in SHAPES.items()}
    return compress(jax.tree.map(jnp.asarray, params), projector).params


def apply(params, x):
    x = jax.lax.conv_general_dilated(
        x,
        params["conv"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x).mean((1, 2))
    return jax.nn.relu(x @ params["hidden"]) @ params["head"]


def in_order_of(kernel, shape):
    """A kernel of ours in the layout of Core ML."""
    kernel = np.asarray(kernel)
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    return kernel if kernel.shape == shape else kernel.T


@pytest.mark.parametrize(
    ("weights", "projector", "bits"),
    [
        ("float16", top_k(0.9), 1 + 0.1 * 16),
        ("int8", fake_quant(8), 8),
        ("int4", fake_quant(4), 4),
        ("int4 in blocks", fake_quant(4, block=32, scale="float16"), 4.5),
        ("int8", compose(top_k(0.9), fake_quant(8)), 1 + 0.1 * 8),
        ("float16", identity(), 16),
    ],
)
def test_packages_hold_our_weights(tmp_path, weights, projector, bits):
    params = make_params(projector)
    path = tmp_path / "network.mlpackage"
    shape = jax.ShapeDtypeStruct((1, 4, 4, 32), jnp.float32)
    returned = to_coreml(lambda x: apply(params, x), [shape], path, weights=weights)
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.mlpackage"]
    read = coreml_weights(path)
    assert list(read) == list(returned)
    expected = dict(params)
    if weights == "int4 in blocks":
        del expected["hidden"], expected["conv"]  # 16 inputs, and no linear layer
    if bits == 16:
        expected = {}
    assert len(read) == len(expected)
    for held in read.values():
        # The only one of this size.
        (ours,) = (k for k in expected.values() if k.size == held.size)
        ours = in_order_of(ours, held.shape)
        # The numbers in float16; of integers the scale, too.
        tolerance = 2**-11 if weights == "float16" else 2**-9
        np.testing.assert_allclose(held.astype(np.float32), ours, rtol=tolerance)
        assert ((held == 0) == (ours == 0)).all()
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    entries = sum(np.prod(SHAPES[name]) for name in expected)
    dense = sum(map(np.prod, SHAPES.values())) - entries
    # Scales, the program and the manifest beside them.
    assert size < entries * bits / 8 + 2 * dense + 16_000


def test_widths_that_there_are_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="weights must be 'float16', .*, got 'int2'"):
        to_coreml(apply, [], tmp_path / "network.mlpackage", weights="int2")
