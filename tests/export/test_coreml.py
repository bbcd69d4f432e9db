"""Core ML packages hold the network's weights, the zeros as zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax import compress, top_k
from cram_jax.export import coreml_sparse_weights, to_coreml

pytestmark = pytest.mark.filterwarnings("ignore")
for module in ("coremltools", "stablehlo_coreml"):
    pytest.importorskip(module, reason="needs the extra coreml")


def test_zeros_are_a_mask(tmp_path):
    rng = np.random.default_rng(0)
    params = {
        "hidden": jnp.asarray(rng.standard_normal((64, 96)), jnp.float32),
        "head": jnp.asarray(rng.standard_normal((96, 10)), jnp.float32),
    }
    params = compress(params, top_k(0.9)).params

    def apply(x):
        return jax.nn.relu(x @ params["hidden"]) @ params["head"]

    path = tmp_path / "network.mlpackage"
    returned = to_coreml(apply, [np.ones((1, 64), np.float32)], path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.mlpackage"]
    (held,) = coreml_sparse_weights(path).values()  # the head is small: it stays dense
    np.testing.assert_array_equal(held, *returned.values())
    expected = np.asarray(params["hidden"]).astype(np.float16)
    if held.shape != expected.shape:
        held = held.T
    np.testing.assert_array_equal(held, expected)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    # 10 % of the numbers in float16 and a bit for each, beside the dense head.
    weights = 0.1 * 2 * expected.size + expected.size / 8 + 2 * 960
    assert size < weights + 8000  # the program and the manifest
