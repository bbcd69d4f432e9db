"""The operations of a graph: frozen dataclasses of weights and options."""

from cram_jax.engine.operations.base import (
    Input,
    Operation,
    TensorType,
    expect,
    operation,
)
from cram_jax.engine.operations.features import (
    Add,
    Affine,
    Gelu,
    LayerNorm,
    Linear,
    Relu,
    Softmax,
    Tanh,
    batch_norm,
)
from cram_jax.engine.operations.images import (
    AvgPool,
    Conv,
    Flatten,
    MaxPool,
    Mean,
    Padding,
    SpaceToDepth,
    check_window,
    window_pads,
)
from cram_jax.engine.operations.sequences import (
    AddPositions,
    Attention,
    Embedding,
    Token,
)

__all__ = [
    "Add",
    "AddPositions",
    "Affine",
    "Attention",
    "AvgPool",
    "Conv",
    "Embedding",
    "Flatten",
    "Gelu",
    "Input",
    "LayerNorm",
    "Linear",
    "MaxPool",
    "Mean",
    "Operation",
    "Padding",
    "Relu",
    "Softmax",
    "SpaceToDepth",
    "Tanh",
    "TensorType",
    "Token",
    "batch_norm",
    "check_window",
    "expect",
    "operation",
    "window_pads",
]
