"""The sparse product: linear layers and convolutions of every kind."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from cram_jax.engine import arithmetic
from cram_jax.engine.code import Kernel, Value
from cram_jax.engine.kernels.base import KernelSpec

UNIT = 4
"""Outputs that are computed and, as bytes, stored together."""


@dataclass(frozen=True)
class SparseProduct(KernelSpec):
    """``y[o, n] = bias[o] + sum_j weights[o, j] * x[offsets[j] + n]``, and more.

    x is (channels, columns) of 32-bit lanes: a float, or four channels as bytes. An
    offset names a channel and, in a convolution, a tap. One job computes ``tile``
    vectors of columns of some of the outputs.

    Attributes:
      int8: bytes in, 32-bit sums; else float32.
      rows: outputs that share their offsets, those of a block: 1, 2 or 4.
      tile: vectors of columns that stay in registers.
      output: "f32" or, with ``int8``, "u8".
      residual: "f32" or "u8" lanes that are added before the activation, or "".
      activation: "", "relu", "gelu" or "tanh".
      shifted: whether bytes of the output have a zero point above 0.
      masked: whether columns outside of an image are set to ``fill``.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("x", "ends", "offsets", "weights", "bias", "scale", "y", "residual", "mask"),
        *("stride", "first", "units", "chunks"),
        *("residual_scale", "inverse", "zero", "low", "fill"),
    )

    int8: bool
    rows: int
    tile: int
    output: Literal["f32", "u8"] = "f32"
    residual: Literal["", "f32", "u8"] = ""
    activation: str = ""
    shifted: bool = False
    masked: bool = False

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        pointers = {name: k.pointer_argument(name) for name in self.arguments[:9]}
        chunks = k.int_argument("chunks")
        part, chunk = k.divide(k.job, chunks)
        column = k.plus(k.int_argument("first"), k.times(part, self.tile * k.lanes))
        units = k.int_argument("units")
        start, _ = k.divide(k.times(units, chunk), chunks)
        stop, _ = k.divide(k.times(units, k.plus(chunk, 1)), chunks)
        epilogue = _Epilogue(k, self, pointers, column)

        def unit(u: Value) -> None:
            values: list[list[Value]] = []
            for group in range(UNIT // self.rows):
                number = k.plus(k.times(u, UNIT // self.rows), group)
                sums = self._sums(k, pointers, number, column)
                for r in range(self.rows):
                    row = k.plus(k.times(u, UNIT), group * self.rows + r)
                    values.append(epilogue.row(u, row, len(values), sums[r]))
            if self.output == "u8":
                epilogue.store_bytes(u, values)

        k.loop(start, stop, unit)

    def _sums(
        self, k: Kernel, pointers: dict[str, Value], group: Value, column: Value
    ) -> list[list[Value]]:
        """The sums of a group of rows, by row and vector."""
        words = k.target.weight_words if self.int8 else 1
        kind = k.ints if self.int8 else k.floats
        rows, tile = range(self.rows), range(self.tile)
        initial = []
        for r in rows:
            row = k.plus(k.times(group, self.rows), r)
            bias = k.splat(k.scalar(pointers["bias"], row, kind.element))
            initial += [bias] * self.tile
        x = k.at(pointers["x"], column)

        def accumulate(j: Value, *totals: Value) -> list[Value]:
            where = k.index(pointers["offsets"], j)
            vectors = [k.load(x, k.plus(where, t * k.lanes), kind) for t in tile]
            operands = (
                [arithmetic.split_bytes(k, v) for v in vectors]
                if words == 2
                else [[v] for v in vectors]
            )
            results = []
            for r in rows:
                at = k.times(k.plus(k.times(j, self.rows), r), words)
                w = [
                    k.splat(k.scalar(pointers["weights"], k.plus(at, i), kind.element))
                    for i in range(words)
                ]
                for t in tile:
                    total = totals[r * self.tile + t]
                    if self.int8:
                        results.append(arithmetic.dot(k, total, operands[t], w))
                    else:
                        results.append(k.fma(w[0], vectors[t], total))
            return results

        begin = k.index(pointers["ends"], group)
        end = k.index(pointers["ends"], k.plus(group, 1))
        sums = k.loop(begin, end, accumulate, initial)
        return [sums[r * self.tile : (r + 1) * self.tile] for r in rows]


class _Epilogue:
    """From sums to what is stored: scale, residual, activation, bytes, mask."""

    def __init__(
        self,
        k: Kernel,
        spec: SparseProduct,
        pointers: dict[str, Value],
        column: Value,
    ):
        self.k, self.spec, self.pointers, self.column = k, spec, pointers, column
        self.stride = k.int_argument("stride")
        self.residual_scale = k.float_argument("residual_scale")
        self.inverse = k.float_argument("inverse")
        self.zero = k.float_argument("zero")
        self.low = k.float_argument("low")
        self.fill = k.word_argument("fill")

    def row(
        self, unit: Value, row: Value, place: int, sums: list[Value]
    ) -> list[Value]:
        """Finishes one output; stores it unless it is bytes."""
        k, spec = self.k, self.spec
        at = k.plus(k.times(row, self.stride), self.column)
        at_bytes = k.plus(k.times(unit, self.stride), self.column)
        if spec.int8:
            scale = k.splat(k.scalar(self.pointers["scale"], row))
            sums = [k.mul(k.to_float(total), scale) for total in sums]
        finished = []
        for t, value in enumerate(sums):
            if spec.residual == "u8":
                lane = k.plus(at_bytes, t * k.lanes)
                packed = k.load(self.pointers["residual"], lane, k.ints)
                number = k.to_float(arithmetic.unpack(k, packed, place))
                value = k.add(value, k.mul(number, self.residual_scale))
            elif spec.residual == "f32":
                lane = k.plus(at, t * k.lanes)
                other = k.load(self.pointers["residual"], lane)
                if spec.output == "u8":
                    other = k.mul(other, self.residual_scale)
                value = k.add(value, other)
            if spec.output == "f32":
                value = arithmetic.activate(k, value, spec.activation)
                self._store(k.cast(value, k.ints), at, t)
            else:
                if spec.activation in ("gelu", "tanh"):
                    value = arithmetic.activate(k, value, spec.activation)
                    value = k.mul(value, self.inverse)
                if spec.shifted:
                    value = k.add(value, self.zero)
            finished.append(value)
        return finished

    def store_bytes(self, unit: Value, values: list[list[Value]]) -> None:
        """Packs and stores four outputs; clipping is the ReLU."""
        k = self.k
        at = k.plus(k.times(unit, self.stride), self.column)
        low = self.low if self.spec.shifted else None
        for t in range(self.spec.tile):
            self._store(arithmetic.pack(k, [row[t] for row in values], low), at, t)

    def _store(self, value: Value, at: Value, t: int) -> None:
        k = self.k
        if self.spec.masked:
            lane = k.plus(self.column, t * k.lanes)
            mask = k.load(self.pointers["mask"], lane, k.ints)
            value = k.where(mask, value, self.fill)
        k.store(value, self.pointers["y"], k.plus(at, t * k.lanes))
