"""LiteRT (TensorFlow Lite) files, directly from what jax exports."""

import contextlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from cram_jax.export.extras import require, silencing
from cram_jax.validation import check_choice
from cram_jax.writing import replacing

_SIGNATURE = "serving_default"


def to_litert(
    function: Callable[..., Any],
    examples: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    weights: Literal["float32", "int8", "int4", "int4 in blocks"] = "float32",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Writes a function of JAX as a LiteRT file, without TensorFlow.

    Args:
      function: of arrays, with its parameters inside, that returns an array or a tuple
        of arrays; what `jax.export` takes.
      examples: arrays or `jax.ShapeDtypeStruct`, one for each argument; the file is for
        their shapes, batch size included.
      path: of the file, ``.tflite``, which appears when it is complete.
      weights: "float32"; "int8" or "int4", with a scale for each output, for which
        `fake_quant` of 8 or 4 bits trains; or "int4 in blocks" of 32 inputs, of fully
        connected layers, for ``fake_quant(4, block=32, scale="bfloat16")``. Activations
        are rounded to INT8 at run time.
      input_names: of the file's arguments; by default args_0, args_1, ...
      output_names: of its results; by default output_0, output_1, ...

    Raises:
      ValueError: ``weights`` is unknown, there are too many or too few names, or the
        converter cannot express an operation.
      ImportError: litert-converter, or for integers ai-edge-quantizer, is missing.

    Example:
      >>> from cram_jax.export import to_litert
      >>> def apply(x):
      ...     return x @ jnp.ones((64, 32))
      >>> x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
      >>> to_litert(apply, [x], "network.tflite", weights="int8")  # doctest: +SKIP
    """
    check_choice("weights", weights, ("float32", "int8", "int4", "int4 in blocks"))
    converter = require("litert_converter.converter_api_ext", "litert")
    mlir = require("litert_converter.mlir.ir", "litert")
    passes = require("litert_converter.mlir.passmanager", "litert")
    exported = jax.export.export(jax.jit(function), platforms=["cpu"])(*examples)
    inputs = _names("input_names", input_names, "args", len(exported.in_avals))
    outputs = _names("output_names", output_names, "output", len(exported.out_avals))
    context = mlir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = mlir.Module.parse(exported.mlir_module())
        config = converter.ConvertToTFLConfig()
        config.model_origin_framework = "JAX"
        converter.set_signature(module.operation, _SIGNATURE, inputs, outputs)
        try:
            converter.run_convert_to_tfl_passes(module, passes.PassManager(), config)
            content = converter.export_flatbuffer_to_bytes(module.operation)
        except (RuntimeError, ValueError, mlir.MLIRError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"LiteRT has no form for this function: {reason}"
            ) from None
    if weights != "float32":
        content = _quantise(content, weights)
    with replacing(path) as beside:
        beside.write_bytes(content)


def run_litert(path: str | os.PathLike[str], *, threads: int = 1) -> Callable[..., Any]:
    """A LiteRT file as a function of NumPy arrays, in the order of its signature.

    Args:
      path: of the file, as `to_litert` writes it.
      threads: how many work on a call.

    Returns:
      A function of arrays, of the shapes that the file is for, that returns an array,
      or a tuple of them if the file has several outputs.

    Raises:
      ImportError: ai-edge-litert is not installed.
      OSError: the file cannot be read.

    Example:
      >>> import numpy as np
      >>> from cram_jax.export import run_litert, to_litert
      >>> x = np.array([[1.0, -2.0]], np.float32)
      >>> to_litert(jax.nn.relu, [x], "relu.tflite")  # doctest: +SKIP
      >>> run_litert("relu.tflite")(x)  # doctest: +SKIP
      array([[1., 0.]], dtype=float32)
    """
    interpreter = require("ai_edge_litert.interpreter", "litert").Interpreter(
        model_content=Path(path).read_bytes(), num_threads=threads
    )
    runner = interpreter.get_signature_runner(_SIGNATURE)
    details = runner.get_input_details()
    # A signature lists its names alphabetically, the graph by position.
    names = _ordered(details, interpreter.get_input_details())
    order = _ordered(runner.get_output_details(), interpreter.get_output_details())

    def call(*inputs: Any) -> Any:
        feed = {
            name: np.asarray(x, details[name]["dtype"])
            for name, x in zip(names, inputs, strict=True)
        }
        results = runner(**feed)
        arrays = tuple(results[name] for name in order)
        return arrays[0] if len(arrays) == 1 else arrays

    return call


def _ordered(named: dict[str, Any], tensors: list[dict[str, Any]]) -> list[str]:
    places = [tensor["index"] for tensor in tensors]
    return sorted(named, key=lambda name: places.index(named[name]["index"]))


def _quantise(content: bytes, weights: str) -> bytes:
    require("ai_edge_quantizer", "litert")
    quantizer = require("ai_edge_quantizer.quantizer", "litert")
    recipe = require("ai_edge_quantizer.recipe", "litert")
    make = {
        "int8": recipe.dynamic_wi8_afp32,
        "int4": recipe.dynamic_wi4_afp32,
        "int4 in blocks": recipe.dynamic_wi4b32_afp32,
    }[weights]
    # It prints what it did.
    with silencing, contextlib.redirect_stdout(io.StringIO()):
        result = quantizer.Quantizer(content, make()).quantize()
    return bytes(result.quantized_model)


def _names(
    argument: str, names: Sequence[str] | None, stem: str, count: int
) -> list[str]:
    found = [f"{stem}_{i}" for i in range(count)] if names is None else list(names)
    if len(found) != count or len(set(found)) != count:
        raise ValueError(f"{argument} must be {count} different names, got {names!r}")
    return found
