"""Batch norm folded into the layer before it."""

import dataclasses

import numpy as np

from cram_jax.engine.graph import Graph, Node, consumers
from cram_jax.engine.operations import Affine, Conv, Linear


def fold_affine(graph: Graph) -> Graph:
    """Multiplies every `Affine` into the convolution or linear layer that it follows.

    In float64, so that weights and biases are rounded once. An `Affine` stays if its
    input is neither, is an output of the graph, or is read by another node too.
    """
    readers = consumers(graph)
    folded: dict[str, Node] = {}
    for node in graph.nodes:
        part = node.operation
        before = folded.get(node.inputs[0]) if node.inputs else None
        if (
            before is None
            or not isinstance(part, Affine)
            or not isinstance(layer := before.operation, Conv | Linear)
            or before.name in graph.outputs
            or len(readers[before.name]) > 1
        ):
            folded[node.name] = node
            continue
        del folded[before.name]
        scale = part.scale.astype(np.float64)
        bias = 0 if layer.bias is None else layer.bias * scale
        layer = dataclasses.replace(
            layer, kernel=layer.kernel * scale, bias=bias + part.offset
        )
        folded[node.name] = Node(node.name, layer, before.inputs)
    return Graph(tuple(folded.values()), graph.outputs)
