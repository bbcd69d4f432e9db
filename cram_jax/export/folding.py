"""Batch norm folded into the layer before it."""

import dataclasses

import numpy as np

from cram_jax.engine import Affine, Conv, Graph, Linear, Node


def fold_affine(graph: Graph) -> Graph:
    """Multiplies every `Affine` into the convolution or linear layer that it follows.

    In float64, so that weights and biases are rounded once. An `Affine` stays if its
    input is neither, is an output of the graph, or is read by another node too.
    """
    readers = {node.name: 0 for node in graph.nodes} | dict.fromkeys(graph.outputs, 1)
    for node in graph.nodes:
        for name in node.inputs:
            readers[name] += 1
    folded: dict[str, Node] = {}
    for node in graph.nodes:
        part = node.operation
        before = folded.get(node.inputs[0]) if isinstance(part, Affine) else None
        if before is None or readers[before.name] > 1:
            folded[node.name] = node
            continue
        layer = before.operation
        if not isinstance(layer, Conv | Linear):
            folded[node.name] = node
            continue
        assert isinstance(part, Affine)
        del folded[before.name]
        scale = part.scale.astype(np.float64)
        bias = 0 if layer.bias is None else layer.bias * scale
        layer = dataclasses.replace(
            layer, kernel=layer.kernel * scale, bias=bias + part.offset
        )
        folded[node.name] = Node(node.name, layer, before.inputs)
    return Graph(tuple(folded.values()), graph.outputs)
