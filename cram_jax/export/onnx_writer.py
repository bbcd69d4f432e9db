"""A graph as an ONNX model: plain operators that every engine knows."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cram_jax.engine import (
    Add,
    AddPositions,
    Affine,
    Attention,
    AvgPool,
    Conv,
    Embedding,
    Flatten,
    Gelu,
    Graph,
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
)
from cram_jax.engine.folding import fold_affine
from cram_jax.engine.operations import window_pads
from cram_jax.export.blockwise import quantise_blocks
from cram_jax.export.extras import require
from cram_jax.nibbles import pack_nibbles

OPSET = 17
IR_VERSION = 8
BLOCK = 32


class OnnxWriter:
    """Writes the nodes of one graph; `model` is the result.

    Args:
      graph: the network.
      bits: of the weights of linear layers: 32, or 4 and 8 for ``MatMulNBits``, an
        operator of ONNX Runtime, in blocks of 32 inputs.
    """

    def __init__(self, graph: Graph, bits: int = 32):
        onnx = require("onnx", "onnx")
        self._onnx, self._helper = onnx, require("onnx.helper", "onnx")
        self._bits = bits
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        folded = fold_affine(graph)
        self._taken = {node.name for node in folded.nodes}
        for node in folded.nodes:
            if isinstance(node.operation, Input):
                continue
            write = _WRITERS.get(type(node.operation))
            if write is None:
                raise ValueError(
                    f"node {node.name!r}: {type(node.operation).__name__} has no form "
                    f"in ONNX"
                )
            kinds = [folded.types[name] for name in node.inputs]
            write(self, node.name, node.operation, kinds, *node.inputs)
        self.model = self._finish(folded)

    def _finish(self, graph: Graph) -> Any:
        helper, tensor = self._helper, self._onnx.TensorProto
        floats, integers = tensor.FLOAT, tensor.INT64
        passed = [node.name for node in graph.inputs]
        # ONNX Runtime's tool for INT8 fails if a name is of an input and an output.
        returned = [
            self._add("Identity", name) if name in passed else name
            for name in graph.outputs
        ]
        inputs, outputs = (
            [
                helper.make_tensor_value_info(
                    name,
                    integers if graph.types[own].dtype == "int32" else floats,
                    _shape(graph.types[own]),
                )
                for name, own in pairs
            ]
            for pairs in (
                zip(passed, passed, strict=True),
                zip(returned, graph.outputs, strict=True),
            )
        )
        constants = [
            self._onnx.numpy_helper.from_array(array, name)
            for name, array in self._constants.items()
        ]
        body = helper.make_graph(self._nodes, "network", inputs, outputs, constants)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain for node in self._nodes):
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        model = helper.make_model(
            body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cram_jax"
        )
        self._onnx.checker.check_model(model)
        return model

    def _constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Stores an array under a name that is free; returns the name."""
        name = self._free(name)
        self._constants[name] = np.array(value, dtype, order="C")
        return name

    def _add(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """Adds an operator; returns the name of its result."""
        out = out or self._free(f"{kind.lower()}_{len(self._nodes)}")
        self._nodes.append(
            self._helper.make_node(
                kind, list(inputs), [out], name=f"{out}:{kind}", **attributes
            )
        )
        return out

    def _free(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    # The methods below are called through `_WRITERS` with the name of the result, the
    # operation, the types of its inputs and their names.
    def _linear(self, name: str, part: Linear, kinds: list[TensorType], x: str) -> None:
        rank = len(kinds[0].shape)
        if rank == 3:
            kernel = part.kernel[None, None]
            self._conv(name, Conv(kernel, part.bias, 1, "VALID"), kinds, x)
            return
        if self._bits < 32:
            self._few_bits(name, part, x)
        elif rank == 1:
            weights = [self._constant(f"{name}.weight", part.kernel)]
            if part.bias is not None:
                weights.append(self._constant(f"{name}.bias", part.bias))
            self._add("Gemm", x, *weights, out=name)
        else:
            weight = self._constant(f"{name}.weight", part.kernel)
            self._biased(
                name, part, lambda out: self._add("MatMul", x, weight, out=out)
            )

    def _biased(self, name: str, part: Linear, product: Callable[[str], str]) -> None:
        if part.bias is None:
            product(name)
        else:
            bias = self._constant(f"{name}.bias", part.bias)
            self._add("Add", product(""), bias, out=name)

    def _few_bits(self, name: str, part: Linear, x: str) -> None:
        inputs, outputs = part.kernel.shape
        levels = quantise_blocks(part.kernel, self._bits, BLOCK)
        stored = pack_nibbles(levels.integers) if self._bits == 4 else levels.unsigned()
        weight = self._constant(f"{name}.weight", stored, np.uint8)
        scales = self._constant(f"{name}.scales", levels.scale.reshape(-1))
        self._biased(
            name,
            part,
            lambda out: self._add(
                "MatMulNBits",
                x,
                weight,
                scales,
                out=out,
                domain="com.microsoft",
                K=inputs,
                N=outputs,
                bits=self._bits,
                block_size=BLOCK,
            ),
        )

    def _conv(self, name: str, part: Conv, kinds: list[TensorType], x: str) -> None:
        weights = [
            self._constant(f"{name}.weight", part.kernel.transpose(3, 2, 0, 1)),
        ]
        if part.bias is not None:
            weights.append(self._constant(f"{name}.bias", part.bias))
        self._add(
            "Conv",
            x,
            *weights,
            out=name,
            kernel_shape=part.kernel.shape[:2],
            strides=part.strides,
            pads=_pads(part, kinds[0]),
        )

    def _pool(self, name: str, part: MaxPool, kinds: list[TensorType], x: str) -> None:
        is_mean = isinstance(part, AvgPool)
        self._add(
            "AveragePool" if is_mean else "MaxPool",
            x,
            out=name,
            kernel_shape=part.window,
            strides=part.strides,
            pads=_pads(part, kinds[0]),
            **({"count_include_pad": 1} if is_mean else {}),
        )

    def _affine(self, name: str, part: Affine, kinds: list[TensorType], x: str) -> None:
        after = (-1, 1, 1) if len(kinds[0].shape) == 3 else (-1,)
        scale = self._constant(f"{name}.scale", part.scale.reshape(after))
        offset = self._constant(f"{name}.offset", part.offset.reshape(after))
        self._add("Add", self._add("Mul", x, scale), offset, out=name)

    def _gelu(self, name: str, part: Gelu, kinds: list[TensorType], x: str) -> None:
        del part, kinds
        root, one, half = (
            self._constant(f"{name}.{label}", value)
            for label, value in (("root", 2**0.5), ("one", 1.0), ("half", 0.5))
        )
        erf = self._add("Erf", self._add("Div", x, root))
        y = self._add("Mul", x, self._add("Add", erf, one))
        self._add("Mul", y, half, out=name)

    def _softmax(
        self, name: str, part: Softmax, kinds: list[TensorType], x: str
    ) -> None:
        del part
        self._add("Softmax", x, out=name, axis=1 if len(kinds[0].shape) == 3 else -1)

    def _same(
        self, name: str, part: Operation, kinds: list[TensorType], *x: str
    ) -> None:
        del kinds
        self._add(type(part).__name__, *x, out=name)

    def _layer_norm(
        self, name: str, part: LayerNorm, kinds: list[TensorType], x: str
    ) -> None:
        del kinds
        scale = self._constant(f"{name}.scale", part.scale)
        bias = self._constant(f"{name}.bias", part.bias)
        self._add("LayerNormalization", x, scale, bias, out=name, epsilon=part.epsilon)

    def _embedding(
        self, name: str, part: Embedding, kinds: list[TensorType], x: str
    ) -> None:
        del kinds
        self._add("Gather", self._constant(f"{name}.table", part.table), x, out=name)

    def _positions(
        self, name: str, part: AddPositions, kinds: list[TensorType], x: str
    ) -> None:
        del kinds
        table = self._constant(f"{name}.table", part.table)
        zero, one, two = (
            self._constant(f"{name}.{number}", [number], np.int64)
            for number in (0, 1, 2)
        )
        length = self._add("Slice", self._add("Shape", x), one, two)
        self._add("Add", x, self._add("Slice", table, zero, length), out=name)

    def _attention(
        self, name: str, part: Attention, kinds: list[TensorType], *x: str
    ) -> None:
        depth = kinds[0].features // part.heads
        split = self._constant(f"{name}.split", [0, 0, part.heads, depth], np.int64)
        query, key, value = (self._add("Reshape", own, split) for own in x[:3])
        query = self._add("Transpose", query, perm=[0, 2, 1, 3])
        key = self._add("Transpose", key, perm=[0, 2, 3, 1])
        value = self._add("Transpose", value, perm=[0, 2, 1, 3])
        root = self._constant(f"{name}.root", depth**0.5)
        scores = self._add("Div", self._add("MatMul", query, key), root)
        if len(x) > 3:
            one = self._constant(f"{name}.one", 1.0)
            floats = self._onnx.TensorProto.FLOAT
            # Any number but zero is a token. By way of BOOL, OpenVINO's INT8 was wrong.
            mask = self._add("Abs", self._add("Cast", x[3], to=floats))
            absent = self._add("Sub", one, self._add("Min", mask, one))
            far = self._constant(f"{name}.far", -1e30)
            axes = self._constant(f"{name}.axes", [1, 2], np.int64)
            far = self._add("Unsqueeze", self._add("Mul", absent, far), axes)
            scores = self._add("Add", scores, far)
        y = self._add("MatMul", self._add("Softmax", scores, axis=-1), value)
        y = self._add("Transpose", y, perm=[0, 2, 1, 3])
        joined = self._constant(f"{name}.joined", [0, 0, kinds[0].features], np.int64)
        self._add("Reshape", y, joined, out=name)

    def _mean(self, name: str, part: Mean, kinds: list[TensorType], x: str) -> None:
        del part, kinds
        self._add("Flatten", self._add("GlobalAveragePool", x), out=name)

    def _flatten(
        self, name: str, part: Flatten, kinds: list[TensorType], x: str
    ) -> None:
        del part, kinds
        self._add("Flatten", self._add("Transpose", x, perm=[0, 2, 3, 1]), out=name)

    def _space_to_depth(
        self, name: str, part: SpaceToDepth, kinds: list[TensorType], x: str
    ) -> None:
        del kinds
        self._add("SpaceToDepth", x, out=name, blocksize=part.size)

    def _token(self, name: str, part: Token, kinds: list[TensorType], x: str) -> None:
        del kinds
        index = self._constant(f"{name}.index", part.index, np.int64)
        self._add("Gather", x, index, out=name, axis=1)


_WRITERS: dict[type[Operation], Callable[..., None]] = {
    Add: OnnxWriter._same,
    AddPositions: OnnxWriter._positions,
    Affine: OnnxWriter._affine,
    Attention: OnnxWriter._attention,
    AvgPool: OnnxWriter._pool,
    Conv: OnnxWriter._conv,
    Embedding: OnnxWriter._embedding,
    Flatten: OnnxWriter._flatten,
    Gelu: OnnxWriter._gelu,
    LayerNorm: OnnxWriter._layer_norm,
    Linear: OnnxWriter._linear,
    MaxPool: OnnxWriter._pool,
    Mean: OnnxWriter._mean,
    Relu: OnnxWriter._same,
    Softmax: OnnxWriter._softmax,
    SpaceToDepth: OnnxWriter._space_to_depth,
    Tanh: OnnxWriter._same,
    Token: OnnxWriter._token,
}


def _shape(kind: TensorType) -> list[int | str]:
    shape = ["length" if size is None else size for size in kind.shape]
    return ["batch", *([shape[-1], *shape[:-1]] if len(shape) == 3 else shape)]


def _pads(part: Conv | MaxPool, kind: TensorType) -> list[int]:
    (top, bottom), (left, right) = window_pads(part, kind)
    return [top, left, bottom, right]
