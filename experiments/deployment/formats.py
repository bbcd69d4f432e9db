"""How a compressed run is written in the formats of other engines and libraries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cram_jax import export
from experiments.deployment.network import Inputs, Network, Samples
from experiments.errors import ConfigError

Call: TypeAlias = Callable[..., np.ndarray]
"""From a network's inputs to its output, computed by the written file."""


EXAMPLES = 32
"""Examples to compare outputs on, and the batch size if a format has only one."""


class Model(NamedTuple):
    """A compressed model, to be written.

    Attributes:
      params: as compressed.
      batch_stats: recalibrated.
      deploy: from parameters and statistics to the network.
      network: of these.
      samples: the examples of its run.
      calibration: batches for INT8 activations; none if they stay in floats.
      is_2_4: whether the target asks for 2:4.
    """

    params: Any
    batch_stats: Any
    deploy: Callable[[Any, Any], Network]
    network: Network
    samples: Samples
    calibration: list[Inputs]
    is_2_4: bool

    @property
    def calibrated(self) -> bool:
        """Whether activations are rounded."""
        return bool(self.calibration)


def write_packed(model: Model, path: Path, bits: int) -> Call:
    """Masks and kept values; they are read back and run by our engine."""
    tree = {"params": model.params, "batch_stats": model.batch_stats}
    values: Any = {32: "same", 16: "float16", 8: "int8", 4: "int4"}[bits]
    export.save_packed(tree, path, values=values)
    again = export.load_packed(path, like=tree)
    graph = model.deploy(again["params"], again["batch_stats"]).graph
    from cram_jax import engine

    return engine.compile(graph)


def write_onnx(model: Model, path: Path, bits: int) -> Call:
    """An ONNX file, run by ONNX Runtime; 2:4 is checked in it."""
    graph = model.network.graph
    batches = model.calibration or None
    export.to_onnx(graph, path, bits=bits, calibration=batches)
    if model.is_2_4:
        layers = export.n_m_layers(path, 2, 4)
        if not any(layers.values()):
            raise ConfigError(f"no layer of {path.name} is 2:4")
    return export.run_onnx(graph, path)


def write_litert(model: Model, path: Path, bits: int) -> Call:
    """A LiteRT file for one batch size, run by the LiteRT interpreter."""
    examples = model.samples.inputs(EXAMPLES)
    weights: Any = {32: "float32", 8: "int8", 4: "int4"}[bits]
    names = [node.name for node in model.network.graph.inputs]
    export.to_litert(
        model.network.forward,
        examples,
        path,
        weights=weights,
        input_names=names,
        output_names=list(model.network.graph.outputs),
    )
    run = export.run_litert(path)

    def padded(*inputs: np.ndarray) -> np.ndarray:
        size = len(inputs[0])
        full = [np.resize(x, (EXAMPLES, *x.shape[1:])) for x in inputs]
        return np.asarray(run(*full))[:size]

    return lambda *inputs: np.concatenate(
        [
            padded(*(x[start : start + EXAMPLES] for x in inputs))
            for start in range(0, len(inputs[0]), EXAMPLES)
        ]
    )


def write_coreml(model: Model, path: Path, bits: int) -> None:
    """A Core ML package for one example; only a Mac can run it."""
    del bits
    export.to_coreml(model.network.forward, model.samples.inputs(1), path)


WRITERS: dict[str, Callable[[Model, Path, int], Call | None]] = {
    "packed": write_packed,
    "onnx": write_onnx,
    "litert": write_litert,
    "coreml": write_coreml,
}
"""Each writes a file and returns a function that runs it, or None if none can here."""
