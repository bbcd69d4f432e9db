"""A network ready to be planned: fused, its products packed, its tensors typed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cram_jax.engine.arrays import Pads
from cram_jax.engine.fusion import Lookup, Product, check_residual
from cram_jax.engine.graph import Graph, Node, consumers
from cram_jax.engine.operations import (
    AddPositions,
    Attention,
    AvgPool,
    Input,
    LayerNorm,
    MaxPool,
    Mean,
    Operation,
    SpaceToDepth,
    TensorType,
    check_window,
    operation,
)
from cram_jax.engine.packing import SparseWeights, pack_kernel
from cram_jax.engine.targets import Target


@dataclass(frozen=True)
class Range:
    """What a byte stands for: ``scale * (byte - zero)``.

    Attributes:
      scale: a positive float32.
      zero: the byte of the number 0.
    """

    scale: float
    zero: int

    def __post_init__(self) -> None:
        if not (np.isfinite(np.float32(self.scale)) and np.float32(self.scale) > 1e-30):
            raise ValueError(f"scale must be positive and finite, got {self.scale!r}")
        if isinstance(self.zero, bool) or not isinstance(self.zero, int | np.integer):
            raise ValueError(f"zero must be an integer, got {self.zero!r}")
        if not 0 <= self.zero <= 255:
            raise ValueError(f"zero must be between 0 and 255, got {self.zero}")

    @classmethod
    def of(cls, low: float, high: float) -> "Range":
        """The range of the numbers from low to high, and 0."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        scale = float(np.float32(max(high - low, 1e-20) / 255))
        return cls(scale, int(np.clip(np.rint(-low / scale), 0, 255)))


@operation
class PackedProduct(Operation):
    """A `Product` whose kernel is packed.

    Attributes:
      weights: the kernel.
      bias: (outputs,).
      strides: of a convolution.
      pads: of a convolution.
      activation: "", "relu", "gelu" or "tanh".
    """

    weights: SparseWeights
    bias: np.ndarray
    strides: tuple[int, int]
    pads: Pads
    activation: str

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        weights = self.weights
        if not inputs or inputs[0].dtype != "float32":
            raise ValueError(f"needs a float32 input, got {inputs}")
        x = inputs[0]
        if x.features != weights.inputs:
            raise ValueError(f"{weights.inputs} inputs do not fit shape {x.shape}")
        shape: tuple[int | None, ...] = x.shape[:-1]
        if len(shape) == 2:
            shape = check_window(x, weights.window, self.strides, self.pads)
        elif (weights.window, self.strides, self.pads) != _LINEAR:
            raise ValueError(f"a convolution needs images, got shape {x.shape}")
        result = TensorType((*shape, weights.outputs))
        check_residual(result, inputs[1:])
        return result


@operation
class IntegerAttention(Attention):
    """`Attention` whose products are of bytes, around a float32 softmax.

    Attributes:
      heads: how many; each has a multiple of four features, at most 2**14.
    """

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        result = super().infer(*inputs)
        if not suits_integers(self, result):
            raise ValueError(
                f"heads={self.heads} must each have a multiple of 4 features, at most "
                f"16384, got {result.features} in all"
            )
        return result


def suits_integers(part: Attention, result: TensorType) -> bool:
    """Whether a head fills lanes of four bytes, and its sums 32 bits."""
    depth = result.features // part.heads
    return depth % 4 == 0 and depth <= 2**14


def with_integer_attention(graph: Graph) -> Graph:
    """A graph with attention of bytes, wherever possible."""
    nodes = [
        replace(node, operation=IntegerAttention(node.operation.heads))
        if type(node.operation) is Attention
        and suits_integers(node.operation, graph.types[node.name])
        else node
        for node in graph.nodes
    ]
    return Graph(tuple(nodes), graph.outputs)


_LINEAR = ((1, 1), (1, 1), ((0, 0), (0, 0)))


@dataclass(frozen=True, eq=False)
class Model:
    """What a plan is made from.

    Attributes:
      graph: fused, with packed products.
      ranges: of the tensors that are bytes; empty in float32.
      forms: for every node "f32", "u8" or both.
    """

    graph: Graph
    ranges: Mapping[str, Range]
    forms: Mapping[str, frozenset[str]]

    @property
    def int8(self) -> bool:
        """Whether products multiply bytes."""
        return bool(self.ranges)


def pack(
    fused: Graph, target: Target, ranges: Mapping[str, Range] | None = None
) -> Model:
    """Packs the products of a fused graph; in INT8, tables too, if there are ranges."""
    nodes = []
    for node in fused.nodes:
        product = node.operation
        if isinstance(product, Product):
            if ranges is None:
                weights = pack_kernel(product.kernel, target)
            else:
                least = _least_scale(product, *(ranges.get(n) for n in node.inputs))
                kernel, scale = quantise_kernel(product.kernel, least)
                weights = pack_kernel(kernel, target, scale)
            packed = PackedProduct(
                weights,
                product.bias.copy(),
                product.strides,
                product.pads,
                product.activation,
            )
            node = Node(node.name, packed, node.inputs)
        elif (
            ranges is not None
            and isinstance(product, Lookup | AddPositions)
            and is_large(product.table)
        ):
            table = restore_rows(*quantise_rows(product.table))
            node = Node(node.name, replace(product, table=table), node.inputs)
        else:
            node = Node(node.name, _with_own_arrays(product), node.inputs)
        nodes.append(node)
    return make_model(Graph(tuple(nodes), fused.outputs), ranges or {})


def _with_own_arrays(part: Operation) -> Operation:
    """A copy: kernels read arrays where they lie, and callers may change theirs."""
    arrays = {n: v.copy() for n, v in vars(part).items() if isinstance(v, np.ndarray)}
    return replace(part, **arrays) if arrays else part  # type: ignore[type-var]


def make_model(graph: Graph, ranges: Mapping[str, Range]) -> Model:
    """A model of a packed graph, with the form of every tensor.

    Raises:
      ValueError: a tensor of bytes has no range, or products differ in kind.
    """
    int8 = bool(ranges)
    for node in graph.nodes:
        part = node.operation
        if isinstance(part, PackedProduct) and part.weights.int8 != int8:
            raise ValueError(
                f"node {node.name!r} must be {'INT8' if int8 else 'float32'} as ranges "
                "say"
            )
    forms = choose_forms(graph, int8)
    ranges = share_ranges(graph, forms, ranges)
    for name, form in forms.items():
        if "u8" in form and name not in ranges:
            raise ValueError(f"node {name!r} has no range")
    return Model(graph, ranges, forms)


def share_ranges(
    graph: Graph, forms: Mapping[str, frozenset[str]], ranges: Mapping[str, Range]
) -> dict[str, Range]:
    """The ranges, with those of pools that select among bytes: their inputs'."""
    shared = dict(ranges)
    for node in graph.nodes:
        selects = is_max_pool(node.operation) and forms[node.name] == {"u8"}
        if selects and node.inputs[0] in shared:
            shared[node.name] = shared[node.inputs[0]]
    return shared


def quantise_kernel(
    kernel: np.ndarray, least: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 for every output: the integers and their scales.

    Args:
      kernel: (height, width, inputs, outputs).
      least: the scale of an output is at least this. Beside a large bias, weights
        below it change nothing, and the bias has to fit into the same integers, as have
        the products of many inputs.
    """
    largest = np.abs(kernel).max(axis=(0, 1, 2))
    scale = np.where(largest > 0, largest / np.float32(127), 1).astype(np.float32)
    scale = np.maximum(scale, np.clip(least, 1e-30, 1e38)).astype(np.float32)
    integers = np.clip(np.rint(kernel / scale), -127, 127).astype(np.int8)
    return integers, np.where(integers.any(axis=(0, 1, 2)), scale, np.float32(1))


def _least_scale(
    product: Product, x: Range | None, residual: Range | None = None
) -> np.ndarray:
    """The scales of weights with which bias and products stay well within 32 bits."""
    assert x is not None
    largest = np.abs(product.bias.astype(np.float64))
    if residual is not None:
        largest = largest + residual.scale * residual.zero
    products = 255 * np.abs(product.kernel).sum(axis=(0, 1, 2), dtype=np.float64)
    return np.maximum(largest / (2**29 * x.scale), products / 2**30)


def is_large(table: np.ndarray) -> bool:
    """Whether bytes are worth the error.

    The few rows of token types take no space, but all tokens have the same one added,
    so that its error adds up: on a BERT for SST-2 it was larger than that of everything
    else.
    """
    return len(table) > 16


def quantise_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 for every row: the integers and their scales.

    A scale has 17 bits, so that 127 times it is exact: a table that was restored from
    integers gives the same integers and scales again.
    """
    largest = np.abs(table).max(axis=1)
    scale = np.where(largest > 0, largest / np.float32(127), 1).astype(np.float32)
    bits = np.maximum(scale, np.float32(1e-30)).view(np.uint32)
    scale = ((bits + np.uint32(127)) & ~np.uint32(127)).view(np.float32)
    return np.rint(table / scale[:, None]).astype(np.int8), scale


def restore_rows(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The float32 table of `quantise_rows`."""
    return rows.astype(np.float32) * scale[:, None]


def choose_forms(graph: Graph, int8: bool) -> dict[str, frozenset[str]]:
    """How the result of every node is stored: as floats, bytes, or both.

    Products and attention of bytes read bytes. Operations that read either get bytes in
    an image, so that a convolutional network has no floats in between, and floats in a
    sequence, so that the residual stream of a transformer is exact.
    """
    readers = consumers(graph)
    forms: dict[str, frozenset[str]] = {}
    for node in reversed(graph.nodes):
        kind = graph.types[node.name]
        wanted = {"f32"} if node.name in graph.outputs else set()
        either = False
        for reader in readers[node.name]:
            part = reader.operation
            if isinstance(part, IntegerAttention):
                wanted.add("u8" if node.name in reader.inputs[:3] else "f32")
            elif int8 and isinstance(part, PackedProduct):
                # It may be both the input and the residual.
                wanted |= {"u8"} if reader.inputs[0] == node.name else set()
                either |= node.name in reader.inputs[1:]
            elif int8 and isinstance(part, Mean):
                either = True
            elif int8 and is_max_pool(part):
                wanted.add("f32" if "f32" in forms[reader.name] else "u8")
            else:
                wanted.add("f32")
        if either and not ("u8" in wanted and len(kind.shape) == 3):
            wanted.add("u8" if len(kind.shape) == 3 and not wanted else "f32")
        if not wanted or kind.dtype == "int32":
            wanted = {"f32"}
        # These write bytes themselves; elsewhere bytes are a copy of floats.
        writes = isinstance(
            part := node.operation, PackedProduct | Input | SpaceToDepth
        )
        writes |= is_max_pool(part) or isinstance(part, LayerNorm)
        if isinstance(part, Attention):
            writes |= kind.features // part.heads % 4 == 0
        if wanted == {"u8"} and not writes:
            wanted = {"u8", "f32"}
        forms[node.name] = frozenset(wanted)
    return forms


def is_max_pool(part: Operation) -> bool:
    """Whether an operation only selects among its inputs, floats or bytes."""
    return isinstance(part, MaxPool) and not isinstance(part, AvgPool)
