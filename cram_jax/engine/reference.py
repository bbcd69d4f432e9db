"""The network in plain NumPy, to compare the engine with."""

import math
from typing import Any

import numpy as np

from cram_jax.engine.fusion import Lookup, Product
from cram_jax.engine.graph import Graph
from cram_jax.engine.operations import (
    Add,
    AddPositions,
    Affine,
    Attention,
    AvgPool,
    Conv,
    Embedding,
    Flatten,
    Gelu,
    LayerNorm,
    Linear,
    MaxPool,
    Mean,
    Relu,
    Softmax,
    SpaceToDepth,
    Tanh,
    TensorType,
    Token,
    window_pads,
)

_erf = np.frompyfunc(math.erf, 1, 1)
_ACTIVATIONS: dict[str, Any] = {
    "": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + _erf(x / 2**0.5).astype(x.dtype)) / 2,
    "tanh": np.tanh,
}


def interpret(graph: Graph, *inputs: Any, dtype: Any = np.float64) -> dict[str, Any]:
    """Computes every node of a graph, fused or not, without compilation.

    Args:
      graph: the network.
      *inputs: arrays with a leading batch axis, in the order of the graph's inputs.
      dtype: of the arithmetic, float32 or wider.

    Returns:
      The arrays of all nodes, by name.

    Raises:
      ValueError: there are more or fewer inputs than the graph has.

    Example:
      >>> from cram_jax import engine
      >>> network = engine.GraphBuilder()
      >>> hidden = network.add(engine.Relu(), network.add(engine.Input((2,))))
      >>> outputs = network.add(engine.Softmax(), hidden)
      >>> engine.interpret(network.build(outputs), [[0.0, -2.0]])[outputs]
      array([[0.5, 0.5]])
    """
    values: dict[str, Any] = {}
    for node, x in zip(graph.inputs, inputs, strict=True):
        is_int = graph.types[node.name].dtype == "int32"
        values[node.name] = np.asarray(x, np.int64 if is_int else dtype)
    for node in graph.nodes:
        if node.name not in values:
            operands = [values[name] for name in node.inputs]
            kind = graph.types[node.inputs[0]]
            values[node.name] = _compute(node.operation, kind, dtype, *operands)
    return values


def _compute(part: Any, kind: TensorType, dtype: Any, *x: Any) -> Any:
    if isinstance(part, Product):
        y = _product(x[0], part.kernel, part.strides, part.pads) + part.bias
        return _ACTIVATIONS[part.activation](y + x[1] if len(x) > 1 else y)
    if isinstance(part, Linear):
        y = x[0] @ part.kernel.astype(x[0].dtype)
        return y if part.bias is None else y + part.bias
    if isinstance(part, Conv):
        y = _product(x[0], part.kernel, part.strides, window_pads(part, kind))
        return y if part.bias is None else y + part.bias
    if isinstance(part, Affine):
        return x[0] * part.scale + part.offset
    if isinstance(part, Add):
        return x[0] + x[1]
    if isinstance(part, Relu | Gelu | Tanh):
        return _ACTIVATIONS[type(part).__name__.lower()](x[0])
    if isinstance(part, Softmax):
        return _softmax(x[0])
    if isinstance(part, LayerNorm):
        apart = x[0] - x[0].mean(-1, keepdims=True)
        variance = (apart**2).mean(-1, keepdims=True)
        return apart / np.sqrt(variance + part.epsilon) * part.scale + part.bias
    if isinstance(part, Lookup | Embedding):
        y = part.table.astype(dtype)[x[0]]
        return y if len(x) == 1 else y + x[1]
    if isinstance(part, AddPositions):
        return x[0] + part.table[: x[0].shape[1]]
    if isinstance(part, Attention):
        return _attention(part.heads, *x)
    if isinstance(part, MaxPool):
        return _pool(part, kind, x[0])
    if isinstance(part, Mean):
        return x[0].mean((1, 2))
    if isinstance(part, Flatten):
        return x[0].reshape(len(x[0]), -1)
    if isinstance(part, SpaceToDepth):
        return space_to_depth(x[0], part.size)
    if isinstance(part, Token):
        return x[0][:, part.index]
    raise TypeError(f"cannot compute {type(part).__name__}")


def space_to_depth(x: np.ndarray, size: int) -> np.ndarray:
    """Squares of an image (batch, height, width, channels) as channels."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // size, width // size, -1)


def windows(
    x: np.ndarray, window: Any, strides: Any, pads: Any, fill: float = 0
) -> np.ndarray:
    """(batch, height, width, window height, window width, channels)."""
    padded = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(padded, window, axis=(1, 2))
    return view[:, :: strides[0], :: strides[1]].transpose(0, 1, 2, 4, 5, 3)


def _product(x: Any, kernel: Any, strides: Any, pads: Any) -> Any:
    kernel = kernel.astype(x.dtype)
    if x.ndim < 4:
        return x @ kernel[0, 0]
    return np.tensordot(windows(x, kernel.shape[:2], strides, pads), kernel, 3)


def _pool(part: MaxPool, kind: TensorType, x: Any) -> Any:
    pads = window_pads(part, kind)
    if isinstance(part, AvgPool):
        return windows(x, part.window, part.strides, pads).mean((3, 4))
    return windows(x, part.window, part.strides, pads, -np.inf).max((3, 4))


def _softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _attention(heads: int, query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    batch, length, features = query.shape
    q, k, v = (x.reshape(batch, length, heads, -1) for x in (query, key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(features / heads)
    if mask is not None:
        scores = np.where(mask[:, None, None] != 0, scores, -1e30)
    attended = np.einsum("bhqk,bkhd->bqhd", _softmax(scores), v)
    return attended.reshape(batch, length, features)
