"""Functions of JAX in ONNX: written if they compute the same, and not otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax.export import ParityError, function_to_onnx, onnx_function

pytest.importorskip("onnxruntime", reason="needs the extra jax2onnx")


def apply(x):
    kernel = jnp.linspace(-1, 1, 6 * 4).reshape(6, 4)
    return jax.nn.relu(x @ kernel)


X = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)


def test_a_function_is_written_and_compared(tmp_path):
    pytest.importorskip("jax2onnx", reason="needs the extra jax2onnx")
    pytest.importorskip("onnx_ir", reason="needs the extra jax2onnx")
    path = tmp_path / "function.onnx"
    assert function_to_onnx(apply, [X], path) < 1e-6
    assert [entry.name for entry in tmp_path.iterdir()] == ["function.onnx"]


def test_a_wrong_conversion_is_not_kept(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT

    class Converter:
        @staticmethod
        def to_onnx(function, inputs, **options):
            """Forgets the kernel."""
            graph = helper.make_graph(
                [helper.make_node("Relu", ["x"], ["y"])],
                "wrong",
                [helper.make_tensor_value_info("x", floats, [3, 6])],
                [helper.make_tensor_value_info("y", floats, [3, 6])],
            )
            opset = helper.make_opsetid("", options["opset"])
            return helper.make_model(graph, opset_imports=[opset], ir_version=8)

    real = onnx_function.require
    monkeypatch.setattr(
        onnx_function,
        "require",
        lambda name, extra: Converter if name == "jax2onnx" else real(name, extra),
    )
    with pytest.raises(
        ParityError, match=r"what jax2onnx wrote returns shape \(3, 6\)"
    ):
        function_to_onnx(apply, [X], tmp_path / "function.onnx")
    assert not list(tmp_path.iterdir())
