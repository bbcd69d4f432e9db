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
      in_blocks: whether it rounds in blocks of 32 inputs.
    """

    params: Any
    batch_stats: Any
    deploy: Callable[[Any, Any], Network]
    network: Network
    samples: Samples
    calibration: list[Inputs]
    is_2_4: bool
    in_blocks: bool


def write_packed(model: Model, path: Path, bits: int) -> Call:
    """Masks and kept values; they are read back and run by our engine, or by JAX."""
    tree = {"params": model.params, "batch_stats": model.batch_stats}
    values: Any = {32: "same", 16: "float16", 8: "int8", 4: "int4"}[bits]
    export.save_packed(tree, path, values=values)
    again = export.load_packed(path, like=tree)
    network = model.deploy(again["params"], again["batch_stats"])
    if network.make_graph is None:
        return lambda *inputs: np.asarray(network.forward(*inputs))
    from cram_jax import engine

    return engine.compile(network.graph)


def write_onnx(model: Model, path: Path, bits: int) -> Call:
    """An ONNX file, run by ONNX Runtime; 2:4 is checked in it.

    A network of the user's own is converted by jax2onnx, for one batch size.
    """
    if model.network.make_graph is None:
        if bits != 32:
            raise ConfigError(
                f"bits must be 32 for {model.network.title}, a network of your own, "
                f"which jax2onnx converts, got {bits}; with a graph of cram_jax.engine "
                f"cram_jax.export.to_onnx writes fewer"
            )
        export.function_to_onnx(
            model.network.forward,
            model.samples.inputs(EXAMPLES),
            path,
            input_names=model.network.inputs,
            output_names=[model.network.output],
        )
        return _in_batches(export.run_onnx_function(path))
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
    export.to_litert(
        model.network.forward,
        model.samples.inputs(EXAMPLES),
        path,
        weights=_weights(model, bits),
        input_names=model.network.inputs,
        output_names=[model.network.output],
    )
    return _in_batches(export.run_litert(path))


def write_coreml(model: Model, path: Path, bits: int) -> None:
    """A Core ML package for one example; only a Mac can run it."""
    examples = model.samples.inputs(1)
    weights = _weights(model, bits)
    export.to_coreml(model.network.forward, examples, path, weights=weights)


WRITERS: dict[str, Callable[[Model, Path, int], Call | None]] = {
    "packed": write_packed,
    "onnx": write_onnx,
    "litert": write_litert,
    "coreml": write_coreml,
}
"""Each writes a file and returns a function that runs it, or None if none can here."""


def _weights(model: Model, bits: int) -> Any:
    """The word for weights of so many bits."""
    integers = "int4 in blocks" if model.in_blocks else "int4"
    return {32: "float32", 16: "float16", 8: "int8", 4: integers}[bits]


def _in_batches(run: Call) -> Call:
    """What takes `EXAMPLES` at a time, for any number of them."""

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
