"""Networks in ONNX Runtime and OpenVINO, in float32 and INT8."""

import importlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from cram_jax.engine import Graph
from cram_jax.engine.targets import choose_target
from cram_jax.export import onnx_inputs, to_onnx
from cram_jax.export.extras import quiet
from experiments.deployment.network import Inputs

Feed: TypeAlias = dict[str, np.ndarray]
"""Inputs by name, as an ONNX file takes them."""
Form: TypeAlias = Literal["float32", "int8", "dynamic"]


class OnnxFiles:
    """A network as ONNX files, each written when it is first asked for.

    INT8 is static, QDQ with a scale for each output, see `cram_jax.export.to_onnx`;
    "dynamic" chooses the scales of linear layers' activations at run time.
    """

    def __init__(self, graph: Graph, calibration: list[Inputs], folder: Path):
        self._graph, self._calibration, self._folder = graph, calibration, folder

    def feed(self, inputs: Inputs) -> Feed:
        """Inputs as the files take them."""
        return onnx_inputs(self._graph, inputs)

    def path(self, form: Form) -> Path:
        """The file of a form.

        Raises:
          ImportError: onnx, or ONNX Runtime for INT8, is not installed.
        """
        path = self._folder / f"{form}.onnx"
        if path.exists():
            return path
        if form == "dynamic":
            self._write_dynamic(path)
        elif form == "int8":
            to_onnx(
                self._graph,
                path,
                bits=8,
                calibration=self._calibration,
                reduce_range="vnni" not in choose_target().name,
            )
        else:
            to_onnx(self._graph, path)
        return path

    def _write_dynamic(self, path: Path) -> None:
        quantization = importlib.import_module("onnxruntime.quantization")
        with quiet():
            quantization.quantize_dynamic(
                self.path("float32"),
                path,
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )


def load_onnxruntime(path: Path, threads: int) -> Callable[[Feed], np.ndarray]:
    """A session of ONNX Runtime on the processor."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Waiting threads must not count as CPU time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    return lambda feed: session.run(None, feed)[0]


def load_openvino(path: Path, threads: int) -> Callable[[Feed], np.ndarray]:
    """A request of OpenVINO on the processor."""
    # Its telemetry would fork this process to send usage data.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    openvino = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = openvino.Core()
    # In a thread of its own: it gives its thread a stack for signals, which goes when
    # the network does. The next signal, such as Ctrl-C, would end in a crash.
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(core.compile_model, path, "CPU", settings).result()
    request = compiled.create_infer_request()
    return lambda feed: next(iter(request.infer(feed).values()))
