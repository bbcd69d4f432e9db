"""Functions of JAX in ONNX: written if they compute the same, and not otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax.export import (
    ParityError,
    function_to_onnx,
    onnx_function,
    run_onnx_function,
)

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


@pytest.mark.filterwarnings("ignore")  # of what jax2onnx imports
def test_a_transformer_of_one_s_own_is_written(tmp_path):
    pytest.importorskip("jax2onnx", reason="needs the extra jax2onnx")
    rng = np.random.default_rng(0)
    table, *kernels = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) / 4
        for shape in ((11, 8), (8, 8), (8, 8), (8, 8), (8, 16), (16, 3))
    )

    def classify(ids, mask):
        x = table[ids]
        query, key, value = (x @ kernel for kernel in kernels[:3])
        scores = query @ key.swapaxes(1, 2) + jnp.where(mask, 0, -1e9)[:, None]
        x = x + jax.nn.softmax(scores) @ value
        x = jax.nn.standardize(x, epsilon=1e-5)
        return jax.nn.gelu(x @ kernels[3], approximate=False)[:, 0] @ kernels[4]

    ids = rng.integers(0, 11, (2, 5)).astype(np.int32)
    mask = np.arange(5) < np.array([[5], [3]])
    path = tmp_path / "text.onnx"
    names = {"input_names": ["ids", "mask"], "output_names": ["logits"]}
    assert function_to_onnx(classify, [ids, mask], path, **names) < 1e-5
    logits = run_onnx_function(path)(ids, mask)
    np.testing.assert_allclose(logits, classify(ids, mask), atol=1e-5)


@pytest.mark.parametrize(
    ("node", "operands", "message"),
    [
        ("Relu", ["x"], r"what jax2onnx wrote returns shape \(3, 6\)"),
        ("MatMul", ["x", "x"], "ONNX Runtime cannot run what jax2onnx wrote: "),
    ],
)
def test_a_wrong_conversion_is_not_kept(tmp_path, monkeypatch, node, operands, message):
    onnx = pytest.importorskip("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT

    class Converter:
        @staticmethod
        def to_onnx(function, inputs, **options):
            """Forgets the kernel."""
            graph = helper.make_graph(
                [helper.make_node(node, operands, ["y"])],
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
    with pytest.raises(ParityError, match=message):
        function_to_onnx(apply, [X], tmp_path / "function.onnx")
    assert not list(tmp_path.iterdir())
