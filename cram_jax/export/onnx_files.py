"""ONNX files: written from a graph, quantised with a calibration, run, and checked."""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cram_jax.engine import Graph
from cram_jax.engine.calibration import as_calibration
from cram_jax.engine.graph import check_graph
from cram_jax.export.extras import quiet, require
from cram_jax.export.onnx_writer import OnnxWriter
from cram_jax.nibbles import unpack_nibbles
from cram_jax.validation import check_integer
from cram_jax.writing import replacing

Inputs = tuple[np.ndarray, ...]


def to_onnx(
    graph: Graph,
    path: str | os.PathLike[str],
    *,
    bits: int = 32,
    calibration: Iterable[Any] | None = None,
    reduce_range: bool = False,
) -> None:
    """Writes a network as an ONNX file.

    Operator set 17 and IR 8, with plain ``Conv``, ``Gemm`` and ``MatMul``; batch norm
    is folded into the layer before it; batch size and length of a sequence are free.
    Images are (batch, channels, height, width) and integers of 64 bits, as is usual in
    ONNX; the names are those of the graph, except of an output that is an input.

    Args:
      graph: the network; see `cram_jax.engine.GraphBuilder`.
      path: of the file, which appears when it is complete.
      bits: 32; 8 with a calibration: INT8 by pairs of ``QuantizeLinear`` and
        ``DequantizeLinear``, weights symmetric with a scale for each output, so that
        `fake_quant` of 8 bits trains for it; 4, or 8 without a calibration: the linear
        layers' weights in blocks of 32 inputs with ``MatMulNBits``, an operator of ONNX
        Runtime, for which `fake_quant` trains with ``block=32, scale="float16"``;
        convolutions, and linear layers of images, stay in float32.
      calibration: batches of inputs, each an array or a tuple of arrays as the engine
        takes them; their smallest and largest activations are the range of INT8.
      reduce_range: with a calibration, 7 bits for weights: on processors without VNNI
        sums of two products of 8 bits overflow 16 bits.

    Raises:
      ValueError: ``bits`` is not 4, 8 or 32, or does not suit the calibration, or that
        has another method than "minmax"; or ONNX cannot express an operation, and the
        error names the node.
      TypeError: ``graph`` is not a graph, ``bits`` not an integer, or the calibration a
        single array.
      ImportError: onnx is not installed, or ONNX Runtime for a calibration.

    Example:
      >>> import tempfile, numpy as np, onnx
      >>> from cram_jax import engine, export
      >>> network = engine.GraphBuilder()
      >>> x = network.add(engine.Linear(np.eye(64)), network.add(engine.Input((64,))))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     export.to_onnx(network.build(x), f"{folder}/network.onnx", bits=4)
      ...     [node.op_type for node in onnx.load(f"{folder}/network.onnx").graph.node]
      ['MatMulNBits']
    """
    check_graph(graph)
    check_integer("bits", bits)
    if bits not in (4, 8, 32):
        raise ValueError(f"bits must be 4, 8 or 32, got {bits}")
    if calibration is not None and bits != 8:
        raise ValueError(f"a calibration needs bits=8, got bits={bits}")
    examples = as_calibration(calibration)
    if examples is not None and examples.method != "minmax":
        raise ValueError(
            f"calibration must be of method 'minmax' for ONNX, got {examples.method!r}"
        )
    model = OnnxWriter(graph, 32 if examples else bits).model
    with replacing(path) as beside:
        if examples is None:
            beside.write_bytes(model.SerializeToString(deterministic=True))
        else:
            batches = [_as_tuple(batch) for batch in examples.batches]
            _quantise(model, graph, batches, beside, reduce_range)


def run_onnx(
    graph: Graph, path: str | os.PathLike[str], *, threads: int = 1
) -> Callable[..., Any]:
    """An ONNX file of a graph in ONNX Runtime, called as the engine is.

    Args:
      graph: that it was written from.
      path: of the file.
      threads: how many work on a call.

    Returns:
      A function of arrays, images as (batch, height, width, channels), that returns a
      float32 array, or a tuple of them if the graph has several outputs.

    Raises:
      ImportError: ONNX Runtime is not installed.

    Example:
      >>> import tempfile
      >>> from cram_jax import engine, export
      >>> network = engine.GraphBuilder()
      >>> x = network.add(engine.Relu(), network.add(engine.Input((2,))))
      >>> graph = network.build(x)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     export.to_onnx(graph, f"{folder}/relu.onnx")
      ...     export.run_onnx(graph, f"{folder}/relu.onnx")([[1.0, -2.0]])
      array([[1., 0.]], dtype=float32)
    """
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Without VNNI sums of two products of bytes would overflow 16 bits and saturate.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = runtime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )

    def call(*inputs: Any) -> Any:
        results = session.run(None, onnx_inputs(graph, inputs))
        results = [x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for x in results]
        return results[0] if len(results) == 1 else tuple(results)

    return call


def onnx_inputs(graph: Graph, inputs: Iterable[Any]) -> dict[str, np.ndarray]:
    """Inputs of the engine as an ONNX file of the graph takes them, by name.

    To run a file of `to_onnx` with any library that runs ONNX.

    Args:
      graph: that the file was written from.
      inputs: arrays as the engine takes them, in the order of the graph's inputs.

    Returns:
      For each input float32, images as (batch, channels, height, width); or int64 if it
      is of integers.

    Raises:
      ValueError: there are more or fewer inputs than the graph has.

    Example:
      >>> import numpy as np
      >>> from cram_jax import engine, export
      >>> network = engine.GraphBuilder()
      >>> image = network.add(engine.Input((32, 32, 3)), name="image")
      >>> graph = network.build(network.add(engine.Mean(), image))
      >>> export.onnx_inputs(graph, [np.ones((1, 32, 32, 3))])["image"].shape
      (1, 3, 32, 32)
    """
    feed = {}
    for node, x in zip(graph.inputs, inputs, strict=True):
        x = np.asarray(x)
        if graph.types[node.name].dtype == "int32":
            feed[node.name] = x.astype(np.int64)
        else:
            x = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
            feed[node.name] = np.ascontiguousarray(x, np.float32)
    return feed


def n_m_layers(path: str | os.PathLike[str], n: int = 2, m: int = 4) -> dict[str, bool]:
    """Whether each layer of an ONNX file keeps at most n of every m weights.

    Groups run along the input channels of a convolution, at every position of its
    window, and along the inputs of a matrix, as TensorRT requires for 2:4.

    Args:
      path: of the file.
      n: how many in a group may be non-zero.
      m: weights in a group; a layer whose inputs it does not divide does not comply.

    Returns:
      A bool for each layer, by the name of its weights.

    Raises:
      ImportError: onnx is not installed.

    Example:
      >>> import tempfile, numpy as np
      >>> from cram_jax import engine, export
      >>> network = engine.GraphBuilder()
      >>> x = network.add(engine.Linear(np.eye(4)), network.add(engine.Input((4,))))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     export.to_onnx(network.build(x), f"{folder}/network.onnx")
      ...     export.n_m_layers(f"{folder}/network.onnx", 2, 4)
      {'linear1.weight': True}
    """
    onnx = require("onnx", "onnx")
    model = onnx.load(os.fspath(path))
    constants = {constant.name: constant for constant in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            stored = onnx.numpy_helper.to_array(constants[node.input[1]])
            options = {a.name: a.i for a in node.attribute}
            weights = _few_bits(stored, options["bits"], options["K"])
            found[node.input[1]] = _complies(weights, n, m)
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        if node.input[1] not in constants:
            continue
        weights = onnx.numpy_helper.to_array(constants[node.input[1]])
        name = constants[node.input[1]].name
        is_transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 1 if node.op_type == "Conv" or is_transposed else weights.ndim - 2
        found[name] = _complies(np.moveaxis(weights, axis, -1), n, m)
    return found


def _few_bits(stored: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    """The integers (outputs, inputs) of ``MatMulNBits``, as we write it."""
    integers = unpack_nibbles(stored) if bits == 4 else stored.astype(np.int16) - 128
    return integers.reshape(len(stored), -1)[:, :inputs]


def _complies(weights: np.ndarray, n: int, m: int) -> bool:
    if weights.shape[-1] % m:
        return False
    return bool((np.count_nonzero(weights.reshape(-1, m), axis=1) <= n).all())


def _quantise(
    model: Any, graph: Graph, batches: list[Inputs], path: Path, reduce_range: bool
) -> None:
    """INT8 by ONNX Runtime's own tool, static and per channel."""
    quantization = require("onnxruntime.quantization", "onnx")
    kinds = quantization.QuantType
    is_text = any(kind.dtype == "int32" for kind in graph.types.values())

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        """The batches, one after the other."""

        def __init__(self) -> None:
            self._feeds = iter([onnx_inputs(graph, batch) for batch in batches])

        def get_next(self) -> Any:
            return next(self._feeds, None)

    options: dict[str, Any] = {"WeightSymmetric": True, "ActivationSymmetric": False}
    products = ["MatMul", "Gemm"]
    constants = {constant.name for constant in model.graph.initializer}
    # Products of two activations, as in attention, stay in floats; in a sequence, so do
    # the outputs of products, the residual stream.
    between = [
        node.name
        for node in model.graph.node
        if node.op_type in products and node.input[1] not in constants
    ]
    if is_text:
        options["OpTypesToExcludeOutputQuantization"] = products
    with tempfile.TemporaryDirectory() as folder, quiet():
        plain = Path(folder) / "float32.onnx"
        plain.write_bytes(model.SerializeToString(deterministic=True))
        quantization.quantize_static(
            plain,
            path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=kinds.QUInt8,
            weight_type=kinds.QInt8,
            op_types_to_quantize=products if is_text else None,
            nodes_to_exclude=between,
            extra_options=options,
        )


def _as_tuple(batch: Any) -> Inputs:
    return batch if isinstance(batch, tuple) else (batch,)
