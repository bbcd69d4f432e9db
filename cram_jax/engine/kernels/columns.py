"""Kernels down the features of every column: layer norm, softmax, pointwise."""

from dataclasses import dataclass
from typing import ClassVar

from cram_jax.engine import arithmetic
from cram_jax.engine.code import Kernel, Value
from cram_jax.engine.kernels.base import LOWEST, KernelSpec, share


@dataclass(frozen=True)
class LayerNormalise(KernelSpec):
    """Layer norm of ``tile`` vectors of columns; as floats, as bytes or both.

    Attributes:
      tile: vectors of columns that a job computes.
      floats: store floats.
      octets: store bytes, four rows in a lane.
      remainder: features behind the last four.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("x", "y", "bytes", "scale", "bias", "features", "stride", "first"),
        *("share", "epsilon", "inverse", "zero"),
    )

    tile: int
    floats: bool
    octets: bool
    remainder: int

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        x, y, octets, scale, bias = (k.pointer_argument(n) for n in self.arguments[:5])
        features, stride = k.int_argument("features"), k.int_argument("stride")
        column = k.plus(k.int_argument("first"), k.times(k.job, self.tile * k.lanes))
        part = k.float_argument("share")
        inverse, zero = k.float_argument("inverse"), k.float_argument("zero")
        tile = range(self.tile)

        def at(row: Value, t: int) -> Value:
            return k.plus(k.times(row, stride), column, t * k.lanes)

        def add_up(row: Value, *sums: Value) -> list[Value]:
            return [k.add(sums[t], k.load(x, at(row, t))) for t in tile]

        zeros = [k.constant(0)] * self.tile
        means = [k.mul(s, part) for s in k.loop(0, features, add_up, zeros)]

        def add_squares(row: Value, *sums: Value) -> list[Value]:
            apart = [k.sub(k.load(x, at(row, t)), means[t]) for t in tile]
            return [k.fma(apart[t], apart[t], sums[t]) for t in tile]

        squares = k.loop(0, features, add_squares, zeros)
        epsilon, one = k.float_argument("epsilon"), k.constant(1)
        root = f"llvm.sqrt.v{k.lanes}f32"
        deviations = [
            k.div(one, k.call(root, k.floats, k.fma(s, part, epsilon))) for s in squares
        ]

        def normalised(row: Value) -> list[Value]:
            weight = k.splat(k.scalar(scale, row))
            offset = k.splat(k.scalar(bias, row))
            values = []
            for t in tile:
                apart = k.sub(k.load(x, at(row, t)), means[t])
                values.append(k.fma(k.mul(apart, deviations[t]), weight, offset))
                if self.floats:
                    k.store(values[t], y, at(row, t))
            return values

        def unit(u: Value, rows: int = 4) -> None:
            values = [normalised(k.plus(k.times(u, 4), r)) for r in range(rows)]
            if self.octets:
                for t in tile:
                    quantised = [
                        k.add(k.mul(row[t], inverse), zero) for row in values
                    ] + [k.constant(0)] * (4 - rows)
                    packed = arithmetic.pack(k, quantised)
                    k.store(packed, octets, at(u, t))

        units, _ = k.divide(features, 4)
        k.loop(0, units, unit)
        if self.remainder:
            unit(units, self.remainder)


@dataclass(frozen=True)
class SoftmaxColumns(KernelSpec):
    """Softmax over the features of every column; one job is some vectors of them.

    Attributes:
      masked: whether columns outside of an image are set to zero.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("x", "y", "mask", "features", "stride", "vectors", "jobs"),
    )

    masked: bool

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        x, y, mask = (k.pointer_argument(name) for name in self.arguments[:3])
        features, stride = k.int_argument("features"), k.int_argument("stride")

        def vector(v: Value) -> None:
            def at(row: Value) -> Value:
                return k.plus(k.times(row, stride), k.times(v, k.lanes))

            def larger(row: Value, top: Value) -> list[Value]:
                return [k.max(top, k.load(x, at(row)))]

            def add_exp(row: Value, total: Value) -> list[Value]:
                e = arithmetic.exp(k, k.sub(k.load(x, at(row)), top))
                k.store(e, y, at(row))
                return [k.add(total, e)]

            def scale(row: Value) -> None:
                k.store(k.mul(k.load(y, at(row)), inverse), y, at(row))

            (top,) = k.loop(0, features, larger, [k.constant(LOWEST)])
            (total,) = k.loop(0, features, add_exp, [k.constant(0)])
            inverse = k.div(k.constant(1), total)
            if self.masked:
                valid = k.load(mask, k.times(v, k.lanes), k.ints)
                inverse = k.where(valid, inverse, k.constant(0))
            k.loop(0, features, scale)

        k.loop(*share(k, k.int_argument("vectors")), vector)


@dataclass(frozen=True)
class Pointwise(KernelSpec):
    """``y = activation(x * scale[row] + offset[row] + other)``, each part optional.

    Attributes:
      activation: "", "relu", "gelu" or "tanh".
      affine: whether there are scale and offset.
      other: whether something is added.
      masked: whether columns outside of an image are set to zero.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("x", "y", "other", "scale", "offset", "mask"),
        *("rows", "stride", "vectors", "jobs"),
    )

    activation: str
    affine: bool
    other: bool
    masked: bool

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        x, y, other, scale, offset, mask = (
            k.pointer_argument(name) for name in self.arguments[:6]
        )
        stride, vectors = k.int_argument("stride"), k.int_argument("vectors")

        def row(r: Value) -> None:
            if self.affine:
                multiplier = k.splat(k.scalar(scale, r))
                shift = k.splat(k.scalar(offset, r))

            def vector(v: Value) -> None:
                at = k.plus(k.times(r, stride), k.times(v, k.lanes))
                value = k.load(x, at)
                if self.affine:
                    value = k.fma(value, multiplier, shift)
                if self.other:
                    value = k.add(value, k.load(other, at))
                value = arithmetic.activate(k, value, self.activation)
                if self.masked:
                    valid = k.load(mask, k.times(v, k.lanes), k.ints)
                    value = k.where(valid, value, k.constant(0))
                k.store(value, y, at)

            k.loop(0, vectors, vector)

        k.loop(*share(k, k.int_argument("rows")), row)
