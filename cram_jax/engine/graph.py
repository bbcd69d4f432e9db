"""A network as a small typed graph, which the engine compiles and export writes."""

from dataclasses import dataclass, field
from typing import Any

from cram_jax.engine.operations import (
    Input,
    Operation,
    SpaceToDepth,
    TensorType,
    expect,
)


@dataclass(frozen=True, eq=False)
class Node:
    """An operation in a graph.

    Attributes:
      name: its own name.
      operation: what it computes.
      inputs: the names of the nodes that it reads.
    """

    name: str
    operation: Operation
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Graph:
    """A network: nodes in an order in which they can be computed.

    Attributes:
      nodes: the operations; each reads nodes before it.
      outputs: names of the nodes that are returned.
      types: the type of every node's result, by name; inferred.

    Raises:
      ValueError: a node does not fit; the error names it.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    types: dict[str, TensorType] = field(init=False)

    def __post_init__(self) -> None:
        types: dict[str, TensorType] = {}
        lengths: set[int | None] = set()
        passed: set[str] = set()
        for node in self.nodes:
            is_text = isinstance(node.name, str)
            expect(is_text, f"names of nodes must be texts, got {node.name!r}")
            expect(node.name not in types, f"two nodes are called {node.name!r}")
            for name in node.inputs:
                expect(
                    isinstance(name, str) and name in types,
                    f"node {node.name!r} reads {name!r}, which is not before it",
                )
            inputs = [types[name] for name in node.inputs]
            try:
                types[node.name] = node.operation.infer(*inputs)
            except ValueError as error:
                what = type(node.operation).__name__
                raise ValueError(f"node {node.name!r} ({what}): {error}") from None
            if isinstance(node.operation, SpaceToDepth):
                expect(
                    node.inputs[0] in passed,
                    f"node {node.name!r} (SpaceToDepth): reads an input of the graph "
                    f"only, got {node.inputs[0]!r}",
                )
            if isinstance(node.operation, Input):
                passed.add(node.name)
                kind = types[node.name]
                if kind.has_length:
                    lengths.add(kind.shape[0])
        expect(len(lengths) <= 1, f"inputs must share one length, got {lengths}")
        expect(len(self.outputs) > 0, "a graph needs an output")
        for name in self.outputs:
            is_node = isinstance(name, str) and name in types
            expect(is_node, f"output {name!r} is not a node")
            expect(types[name].dtype == "float32", f"output {name!r} is not float32")
        object.__setattr__(self, "types", types)

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes that the caller passes."""
        return tuple(n for n in self.nodes if isinstance(n.operation, Input))


class GraphBuilder:
    """Builds a graph, node by node.

    Example:
      >>> import numpy as np
      >>> from cram_jax.engine import GraphBuilder, Input, Linear, Relu
      >>> network = GraphBuilder()
      >>> x = network.add(Input((3,)))
      >>> x = network.add(Linear(np.ones((3, 4))), x)
      >>> graph = network.build(network.add(Relu(), x))
      >>> graph.types[graph.outputs[0]].shape
      (4,)
    """

    def __init__(self) -> None:
        self._nodes: list[Node] = []

    def add(self, operation: Operation, *inputs: str, name: str | None = None) -> str:
        """Adds a node.

        Args:
          operation: what it computes.
          *inputs: the names of the nodes that it reads.
          name: its own name; by default its kind and number.

        Returns:
          The name.

        Raises:
          TypeError: ``operation`` is something else, such as a class.
        """
        if not isinstance(operation, Operation):
            raise TypeError(f"operation must be an operation, got {operation!r}")
        name = name or self._free_name(type(operation).__name__.lower())
        self._nodes.append(Node(name, operation, inputs))
        return name

    def build(self, *outputs: str) -> Graph:
        """Checks the nodes, and makes a graph of them.

        Args:
          *outputs: the names of the nodes that are returned.

        Returns:
          The graph.

        Raises:
          ValueError: a node does not fit, and the error names it; or an output is
            missing or no node.
        """
        return Graph(tuple(self._nodes), outputs)

    def _free_name(self, kind: str) -> str:
        taken, number = {node.name for node in self._nodes}, len(self._nodes)
        while f"{kind}{number}" in taken:
            number += 1
        return f"{kind}{number}"


def check_graph(value: Any) -> None:
    """Raises a TypeError unless the value is a graph."""
    if not isinstance(value, Graph):
        raise TypeError(f"graph must be a Graph, got {type(value).__name__}")


def consumers(graph: Graph) -> dict[str, list[Node]]:
    """The nodes that read each node."""
    readers: dict[str, list[Node]] = {node.name: [] for node in graph.nodes}
    for node in graph.nodes:
        for name in node.inputs:
            readers[name].append(node)
    return readers
