"""ONNX files of any function, by jax2onnx, kept only if they compute the same."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cram_jax.export.extras import require
from cram_jax.export.parity import ParityError, check_parity
from cram_jax.writing import replacing

OPSET = 18
"""Below this version jax2onnx writes an invalid ReduceMean."""


def function_to_onnx(
    function: Callable[..., Any],
    examples: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    tolerance: float = 1e-4,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> float:
    """Writes a function of JAX as an ONNX file, if the file computes the same.

    The conversion is that of jax2onnx, which is young: some networks come out wrong
    without an error. So the file is run in ONNX Runtime on the examples, and compared
    with JAX before it gets its name. For networks with a graph of `cram_jax.engine`,
    `to_onnx` writes plainer files.

    Args:
      function: of arrays, with its parameters inside.
      examples: arrays, one for each argument, of the shapes that the file is for; real
        inputs, as they decide whether it is kept.
      path: of the file.
      tolerance: the difference allowed, as a share of the largest output.
      input_names: of the file's inputs; by default those of jax2onnx.
      output_names: of its outputs; by default those of jax2onnx.

    Returns:
      The largest difference on the examples, as a share of the largest output.

    Raises:
      ParityError: the file computes something else, or cannot be run; it is not kept.
      ImportError: jax2onnx or ONNX Runtime is not installed.

    Example:
      >>> import numpy as np
      >>> from cram_jax.export import function_to_onnx
      >>> kernel = jnp.ones((4, 2))
      >>> x = np.ones((1, 4), np.float32)
      >>> function_to_onnx(lambda x: x @ kernel, [x], "a.onnx")  # doctest: +SKIP
      0.0
    """
    convert = require("jax2onnx", "jax2onnx").to_onnx
    require("onnxruntime", "jax2onnx")
    arrays = [np.asarray(x) for x in examples]
    model = convert(
        function,
        arrays,
        opset=OPSET,
        input_names=input_names,
        output_names=output_names,
    )
    with replacing(path) as beside:
        beside.write_bytes(model.SerializeToString(deterministic=True))
        try:
            got = run_onnx_function(beside)(*arrays)
        except Exception as error:  # ONNX Runtime's have no class of their own
            reason = str(error).strip().split("\n")[0]
            raise ParityError(
                f"ONNX Runtime cannot run what jax2onnx wrote: {reason}"
            ) from error
        leaves = jax.tree.leaves(jax.jit(function)(*arrays))
        expected = leaves[0] if len(leaves) == 1 else tuple(leaves)
        return check_parity(got, expected, tolerance, "what jax2onnx wrote")


def run_onnx_function(
    path: str | os.PathLike[str], *, threads: int = 1
) -> Callable[..., Any]:
    """A file of `function_to_onnx` in ONNX Runtime, called as the function is.

    Args:
      path: of the file.
      threads: how many work on a call.

    Returns:
      A function of arrays, which returns an array, or a tuple of them if the file has
      several outputs.

    Raises:
      ImportError: ONNX Runtime is not installed.

    Example:
      >>> import numpy as np
      >>> from cram_jax.export import function_to_onnx, run_onnx_function
      >>> x = np.array([[1.0, -2.0]], np.float32)
      >>> function_to_onnx(jax.nn.relu, [x], "relu.onnx")  # doctest: +SKIP
      0.0
      >>> run_onnx_function("relu.onnx")(x)  # doctest: +SKIP
      array([[1., 0.]], dtype=float32)
    """
    runtime = require("onnxruntime", "jax2onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def call(*inputs: Any) -> Any:
        arrays = [np.asarray(x) for x in inputs]
        results = session.run(None, dict(zip(names, arrays, strict=True)))
        return results[0] if len(results) == 1 else tuple(results)

    return call
