"""Fuses the nodes of a graph that one kernel can compute."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cram_jax.engine.arrays import Pads
from cram_jax.engine.folding import fold_affine
from cram_jax.engine.graph import Graph, Node, consumers
from cram_jax.engine.operations import (
    Add,
    Conv,
    Embedding,
    Gelu,
    Input,
    Linear,
    Operation,
    Relu,
    Tanh,
    TensorType,
    expect,
    operation,
    window_pads,
)

ACTIVATIONS: dict[type, str] = {Relu: "relu", Gelu: "gelu", Tanh: "tanh"}


def check_residual(result: TensorType, residuals: Sequence[TensorType]) -> None:
    """Raises a ValueError unless there is at most one, of the result's type."""
    expect(len(residuals) <= 1, f"needs 1 or 2 inputs, got {1 + len(residuals)}")
    for residual in residuals:
        expect(residual == result, f"the residual is {residual}, the result {result}")


@operation
class Product(Operation):
    """A linear layer or a convolution, with everything that follows it.

    ``activation(product(x) + bias + residual)``; the residual is a second input.

    Attributes:
      kernel: (height, width, inputs, outputs); a linear layer is 1 x 1.
      bias: (outputs,).
      strides: of a convolution.
      pads: of a convolution, in numbers.
      activation: "", "relu", "gelu" or "tanh".
    """

    kernel: np.ndarray
    bias: np.ndarray
    strides: tuple[int, int] = (1, 1)
    pads: Pads = ((0, 0), (0, 0))
    activation: str = ""

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        if len(inputs[0].shape) < 3:
            return Linear(self.kernel[0, 0], self.bias).infer(inputs[0])
        conv = Conv(self.kernel, self.bias, self.strides, self.pads)
        return conv.infer(inputs[0])


@operation
class Lookup(Operation):
    """Rows of a table by integers, plus a residual, the second input.

    Attributes:
      table: (entries, features).
    """

    table: np.ndarray

    def __post_init__(self) -> None:
        checked = Embedding(self.table).table
        # Kernels compute ids * features in 32 bits.
        expect(checked.size < 2**31, f"table has {checked.size} entries")
        object.__setattr__(self, "table", checked)

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        result = Embedding(self.table).infer(*inputs[:1])
        check_residual(result, inputs[1:])
        return result


def fuse(graph: Graph) -> Graph:
    """The same network, with what follows products and look-ups fused into them.

    Batch norm is folded into weights; a sum becomes the residual of one of its terms;
    an activation is applied before the result is stored. Only values that nothing else
    reads disappear; a fused node has the name of its last part.
    """
    graph = fold_affine(graph)
    readers = consumers(graph)
    absorbed: set[str] = set()
    fused: dict[str, Node] = {}
    positions = {node.name: i for i, node in enumerate(graph.nodes)}

    def only_reader(name: str) -> Node | None:
        if name in graph.outputs or len(readers[name]) != 1:
            return None
        (reader,) = readers[name]
        return None if reader.name in absorbed else reader

    for node in graph.nodes:
        if node.name in absorbed:
            continue
        if isinstance(node.operation, Linear | Conv):
            parts = [node]
            product = _as_product(node.operation, graph.types[node.inputs[0]])
            inputs = list(node.inputs)
            while (reader := only_reader(parts[-1].name)) is not None:
                extended = _extend(product, reader, len(inputs) > 1)
                if extended is None:
                    break
                product = extended
                if isinstance(reader.operation, Add):
                    # x + x reads it twice, so there is no other term.
                    others = [n for n in reader.inputs if n != parts[-1].name]
                    if len(others) != 1:
                        break
                    inputs += others
                parts.append(reader)
            absorbed.update(part.name for part in parts)
            fused[parts[-1].name] = Node(parts[-1].name, product, tuple(inputs))
        elif isinstance(node.operation, Embedding):
            lookup = Lookup(node.operation.table)
            reader = only_reader(node.name)
            others = [n for n in reader.inputs if n != node.name] if reader else []
            if reader and isinstance(reader.operation, Add) and len(others) == 1:
                absorbed.update((node.name, reader.name))
                inputs = [node.inputs[0], *others]
                fused[reader.name] = Node(reader.name, lookup, tuple(inputs))
            else:
                fused[node.name] = Node(node.name, lookup, node.inputs)
        else:
            fused[node.name] = node
    ordered = sorted(fused.values(), key=lambda node: positions[node.name])
    return Graph(tuple(_reachable(ordered, graph.outputs)), graph.outputs)


def _as_product(layer: Linear | Conv, x: TensorType) -> Product:
    kernel = layer.kernel if isinstance(layer, Conv) else layer.kernel[None, None]
    outputs = kernel.shape[-1]
    bias = np.zeros(outputs, np.float32) if layer.bias is None else layer.bias
    if isinstance(layer, Linear):
        return Product(kernel, bias)
    strides = layer.strides
    assert isinstance(strides, tuple)
    return Product(kernel, bias, strides, window_pads(layer, x))


def _extend(product: Product, reader: Node, has_residual: bool) -> Product | None:
    """The product with one more node fused into it, or None if it does not fit."""
    if product.activation:
        return None
    part = reader.operation
    if isinstance(part, Add) and not has_residual:
        return product
    if type(part) in ACTIVATIONS:
        return dataclasses.replace(product, activation=ACTIVATIONS[type(part)])
    return None


def _reachable(nodes: Sequence[Node], outputs: Sequence[str]) -> list[Node]:
    """Nodes that an output depends on, and all inputs."""
    needed = set(outputs)
    kept = []
    for node in reversed(nodes):
        if node.name in needed or isinstance(node.operation, Input):
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]
