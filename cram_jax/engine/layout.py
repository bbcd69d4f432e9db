"""The grid of each tensor of a graph."""

from cram_jax.engine.geometry import Grid
from cram_jax.engine.graph import Graph, Node
from cram_jax.engine.model import PackedProduct
from cram_jax.engine.operations import (
    AvgPool,
    Flatten,
    MaxPool,
    Mean,
    SpaceToDepth,
    Token,
)

Phase = tuple[int, int]


def phase_of(product: PackedProduct) -> list[tuple[Phase, tuple[int, int]]]:
    """For every tap: the phase it reads, and the shift by rows and columns.

    Output position ``o`` reads position ``stride * o + tap - pad``, which is
    ``stride * (o + shift) + phase``.
    """
    height, width = product.weights.window
    taps = []
    for i in range(height):
        for j in range(width):
            at = (i - product.pads[0][0], j - product.pads[1][0])
            split = [divmod(a, s) for a, s in zip(at, product.strides, strict=True)]
            (row_shift, row_phase), (column_shift, column_phase) = split
            taps.append(((row_phase, column_phase), (row_shift, column_shift)))
    return taps


class Layout:
    """The grids of a graph for one batch size and length.

    Tensors that a stride-1 convolution or a sum connects share a grid.

    Attributes:
      grids: of every node.
      sizes: height and width of every node; (1, length) of sequences.
      last_read: the index of the last node that reads each node.
    """

    def __init__(self, graph: Graph, lanes: int, batch: int, length: int):
        self._parent = {node.name: node.name for node in graph.nodes}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.last_read = {node.name: i for i, node in enumerate(graph.nodes)}
        for index, node in enumerate(graph.nodes):
            kind = graph.types[node.name]
            if len(kind.shape) == 3:
                self.sizes[node.name] = kind.shape[0] or 1, kind.shape[1] or 1
            elif kind.has_length:
                self.sizes[node.name] = 1, length
            else:
                self.sizes[node.name] = 1, 1
            for name in node.inputs:
                self.last_read[name] = index
                if _shares_grid(node, name):
                    self._parent[self._root(name)] = self._root(node.name)
        self.grids: dict[str, Grid] = {}
        self._quarters: dict[int, Grid] = {}
        by_root: dict[str, Grid] = {}
        for node in graph.nodes:
            root = self._root(node.name)
            if root not in by_root:
                unit = lanes if graph.types[node.name].has_length else 1
                by_root[root] = Grid(batch, lanes, (1, 1), unit=unit)
            self.grids[node.name] = by_root[root]
            by_root[root].require(self.sizes[node.name])
        for node in graph.nodes:
            if isinstance(node.operation, PackedProduct):
                self._require_taps(node, node.operation)

    def quarter(self, grid: Grid) -> Grid:
        """The grid of tensors with four neighbouring columns of another in a lane."""
        if id(grid) not in self._quarters:
            columns = -(-grid.stride // 4)
            self._quarters[id(grid)] = Grid(1, grid.lanes, (1, columns))
        return self._quarters[id(grid)]

    def masked(self, name: str) -> bool:
        """Whether columns of a node's grid are padding that others may read."""
        grid = self.grids[name]
        return grid.gap != (0, 0) or grid.size != self.sizes[name]

    def _require_taps(self, node: Node, product: PackedProduct) -> None:
        grid = self.grids[node.name]
        taps = phase_of(product)
        gap = [max(abs(shift[axis]) for _, shift in taps) for axis in (0, 1)]
        size = self.sizes[node.inputs[0]]
        for phase in {phase for phase, _ in taps}:
            grid.require(
                [
                    -(-(extent - first) // stride)
                    for extent, first, stride in zip(
                        size, phase, product.strides, strict=True
                    )
                ],
                gap,
            )

    def _root(self, name: str) -> str:
        while self._parent[name] != name:
            name = self._parent[name]
        return name


def _shares_grid(node: Node, name: str) -> bool:
    part = node.operation
    if isinstance(part, PackedProduct):
        return part.strides == (1, 1) or name in node.inputs[1:]
    return not isinstance(
        part, MaxPool | AvgPool | Mean | Flatten | Token | SpaceToDepth
    )
