"""The engines that can run a network, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cram_jax import engine
from experiments.deployment.network import Inputs, Network
from experiments.deployment.peers import OnnxFiles, load_onnxruntime, load_openvino


@dataclass(frozen=True)
class Loaded:
    """A network, loaded by an engine.

    Attributes:
      bind: from inputs to a function without arguments that runs the network on them;
        inputs are converted beforehand.
      nbytes: what the network takes on disk.
    """

    bind: Callable[[Inputs], Callable[[], np.ndarray]]
    nbytes: int

    def __call__(self, inputs: Inputs) -> np.ndarray:
        """The output for some inputs."""
        return self.bind(inputs)()


@dataclass(frozen=True)
class Deployment:
    """A network to be loaded, with what engines need besides.

    Attributes:
      network: the network.
      calibration: batches for INT8.
      method: how our engine chooses the ranges of activations, see
        `cram_jax.engine.Calibration`.
      files: its ONNX files.
      folder: for files.
      tune: whether our engine measures tiles first, and with which inputs.
    """

    network: Network
    calibration: list[Inputs]
    method: str
    files: OnnxFiles
    folder: Path
    tune: Inputs | None = None


def _load_ours(deployment: Deployment, threads: int, *, int8: bool) -> Loaded:
    examples = engine.Calibration(deployment.calibration, deployment.method)
    compiled = engine.compile(
        deployment.network.graph,
        calibration=examples if int8 else None,
        threads=threads,
    )
    if deployment.tune is not None:
        compiled.tune(*deployment.tune)
    file = deployment.folder / f"engine-{'int8' if int8 else 'float32'}.safetensors"
    compiled.save(file)
    return Loaded(
        lambda inputs: lambda: np.asarray(compiled(*inputs)), file.stat().st_size
    )


def _load_jit(deployment: Deployment, threads: int) -> Loaded:
    del threads  # XLA has one pool for the process
    network = deployment.network

    def bind(inputs: Inputs) -> Callable[[], np.ndarray]:
        arrays = jax.device_put(inputs)
        return lambda: np.asarray(network.forward(*arrays))

    return Loaded(bind, network.nbytes)


def _load_onnx(deployment: Deployment, threads: int, *, kind: Any, load: Any) -> Loaded:
    path = deployment.files.path(kind)
    run = load(path, threads)

    def bind(inputs: Inputs) -> Callable[[], np.ndarray]:
        feed = deployment.files.feed(inputs)
        return lambda: np.asarray(run(feed))

    return Loaded(bind, path.stat().st_size)


class EngineInfo(NamedTuple):
    """What is known about an engine.

    Attributes:
      load: from a deployment and a number of threads to a network.
      label: in tables.
      skips_zeros: whether zeros save time; engines that multiply them run only the
        dense network.
      int8: whether it computes in INT8.
      only_text: whether it is useful only for BERTs.
    """

    load: Callable[[Deployment, int], Loaded]
    label: str
    skips_zeros: bool = False
    int8: bool = False
    only_text: bool = False


def _ours(int8: bool) -> Callable[[Deployment, int], Loaded]:
    return lambda deployment, threads: _load_ours(deployment, threads, int8=int8)


def _onnx(kind: str, load: Any) -> Callable[[Deployment, int], Loaded]:
    return lambda deployment, threads: _load_onnx(
        deployment, threads, kind=kind, load=load
    )


ENGINES: dict[str, EngineInfo] = {
    "cram": EngineInfo(_ours(True), "cram_jax INT8", skips_zeros=True, int8=True),
    "cram-float32": EngineInfo(_ours(False), "cram_jax float32", skips_zeros=True),
    "onnxruntime": EngineInfo(
        _onnx("float32", load_onnxruntime), "ONNX Runtime float32"
    ),
    "onnxruntime-int8": EngineInfo(
        _onnx("int8", load_onnxruntime), "ONNX Runtime INT8", int8=True
    ),
    "onnxruntime-dynamic": EngineInfo(
        _onnx("dynamic", load_onnxruntime),
        "ONNX Runtime INT8, dynamic",
        int8=True,
        only_text=True,
    ),
    "openvino": EngineInfo(_onnx("float32", load_openvino), "OpenVINO float32"),
    "openvino-int8": EngineInfo(
        _onnx("int8", load_openvino), "OpenVINO INT8", int8=True
    ),
    "jit": EngineInfo(_load_jit, "jax.jit float32"),
}
