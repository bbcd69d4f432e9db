"""Runs pruned networks fast on a processor: a graph in, machine code out.

`compile` makes an `Engine` of a `Graph`: sparse float32, or sparse INT8 with a
calibration. It needs llvmlite, ``pip install 'cram_jax[engine]'``, and no compiler.
"""

from cram_jax.engine.calibration import Calibration
from cram_jax.engine.engine import Engine, compile
from cram_jax.engine.files import load
from cram_jax.engine.graph import Graph, GraphBuilder, Node
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
    Input,
    LayerNorm,
    Linear,
    MaxPool,
    Mean,
    Operation,
    Relu,
    Softmax,
    SpaceToDepth,
    Tanh,
    TensorType,
    Token,
    batch_norm,
)
from cram_jax.engine.profiling import NodeProfile, Profile
from cram_jax.engine.reference import interpret
from cram_jax.engine.targets import TARGETS, Target

__all__ = [
    "TARGETS",
    "Add",
    "AddPositions",
    "Affine",
    "Attention",
    "AvgPool",
    "Calibration",
    "Conv",
    "Embedding",
    "Engine",
    "Flatten",
    "Gelu",
    "Graph",
    "GraphBuilder",
    "Input",
    "LayerNorm",
    "Linear",
    "MaxPool",
    "Mean",
    "Node",
    "NodeProfile",
    "Operation",
    "Profile",
    "Relu",
    "Softmax",
    "SpaceToDepth",
    "Tanh",
    "Target",
    "TensorType",
    "Token",
    "batch_norm",
    "compile",
    "interpret",
    "load",
]
