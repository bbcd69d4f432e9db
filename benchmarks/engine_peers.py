"""The engine's networks as ONNX models."""

from typing import Any

import numpy as np

from cram_jax.engine import Graph, operations
from cram_jax.engine.fusion import Lookup, Product, fuse


class OnnxWriter:
    """An ONNX model of a graph for one length; images are channels first."""

    def __init__(self, graph: Graph, length: int):
        from onnx import TensorProto, helper, numpy_helper

        self._helper, self._numpy = helper, numpy_helper
        self._length, self._graph = length, fuse(graph)
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        inputs = []
        for node in self._graph.nodes:
            kind = self._graph.types[node.name]
            if isinstance(node.operation, operations.Input):
                shape = [length if s is None else s for s in kind.shape]
                shape = [shape[-1], *shape[:-1]] if len(shape) == 3 else shape
                is_int = kind.dtype == "int32"
                dtype = TensorProto.INT64 if is_int else TensorProto.FLOAT
                inputs.append(
                    helper.make_tensor_value_info(node.name, dtype, ["batch", *shape])
                )
            else:
                self._write(node.name, node.operation, kind, *node.inputs)
        outputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in self._graph.outputs
        ]
        body = helper.make_graph(
            self._nodes, "network", inputs, outputs, self._constants
        )
        opset = [helper.make_opsetid("", 17)]
        self.model = helper.make_model(body, opset_imports=opset, ir_version=8)

    def _constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant{len(self._constants)}"
        array = np.ascontiguousarray(np.asarray(value, dtype))
        self._constants.append(self._numpy.from_array(array, name))
        return name

    def _add(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"value{len(self._nodes)}"
        name = f"node{len(self._nodes)}"
        self._nodes.append(
            self._helper.make_node(kind, list(inputs), [out], name=name, **attributes)
        )
        return out

    def _write(self, name: str, part: Any, kind: Any, *x: str) -> None:
        if isinstance(part, Product):
            self._product(name, part, len(kind.shape), *x)
        elif isinstance(part, Lookup):
            y = self._add("Gather", self._constant(part.table), x[0])
            y = self._add("Add", y, x[1]) if len(x) > 1 else y
            self._add("Identity", y, out=name)
        elif isinstance(part, operations.AddPositions):
            table = self._constant(part.table[: self._length])
            self._add("Add", x[0], table, out=name)
        elif isinstance(part, operations.LayerNorm):
            constants = self._constant(part.scale), self._constant(part.bias)
            self._add(
                "LayerNormalization", x[0], *constants, out=name, epsilon=part.epsilon
            )
        elif isinstance(part, operations.Attention):
            self._attention(name, part.heads, kind.features, *x)
        elif isinstance(part, operations.MaxPool):
            assert not isinstance(part.padding, str)
            (top, bottom), (left, right) = part.padding
            self._add(
                "MaxPool",
                x[0],
                out=name,
                kernel_shape=part.window,
                strides=part.strides,
                pads=[top, left, bottom, right],
            )
        elif isinstance(part, operations.Mean):
            self._add("Flatten", self._add("GlobalAveragePool", x[0]), out=name)
        else:
            raise NotImplementedError(type(part).__name__)

    def _product(self, name: str, part: Product, rank: int, *x: str) -> None:
        if rank == 3:
            kernel = self._constant(part.kernel.transpose(3, 2, 0, 1))
            (top, bottom), (left, right) = part.pads
            y = self._add(
                "Conv",
                x[0],
                kernel,
                self._constant(part.bias),
                kernel_shape=part.kernel.shape[:2],
                strides=part.strides,
                pads=[top, left, bottom, right],
            )
        else:
            y = self._add("MatMul", x[0], self._constant(part.kernel[0, 0]))
            y = self._add("Add", y, self._constant(part.bias))
        if len(x) > 1:
            y = self._add("Add", y, x[1])
        if part.activation == "gelu":
            one, half = self._constant(1.0), self._constant(0.5)
            erf = self._add("Erf", self._add("Div", y, self._constant(2**0.5)))
            y = self._add("Mul", self._add("Mul", y, self._add("Add", erf, one)), half)
        elif part.activation:
            y = self._add(part.activation.title(), y)
        self._add("Identity", y, out=name)

    def _attention(self, name: str, heads: int, features: int, *x: str) -> None:
        shape = [0, 0, heads, features // heads]
        split = self._constant(shape, np.int64)
        query, key, value = (self._add("Reshape", part, split) for part in x[:3])
        query = self._add("Transpose", query, perm=[0, 2, 1, 3])
        key = self._add("Transpose", key, perm=[0, 2, 3, 1])
        value = self._add("Transpose", value, perm=[0, 2, 1, 3])
        root = self._constant((features / heads) ** 0.5)
        scores = self._add("Div", self._add("MatMul", query, key), root)
        if len(x) > 3:
            is_token = self._add("Cast", x[3], to=1)
            absent = self._add("Sub", self._constant(1.0), is_token)
            far = self._add("Mul", absent, self._constant(-1e30))
            axes = self._constant([1, 2], np.int64)
            scores = self._add("Add", scores, self._add("Unsqueeze", far, axes))
        weights = self._add("Softmax", scores, axis=-1)
        y = self._add("MatMul", weights, value)
        y = self._add("Transpose", y, perm=[0, 2, 1, 3])
        joined = self._constant([0, 0, features], np.int64)
        self._add("Reshape", y, joined, out=name)
