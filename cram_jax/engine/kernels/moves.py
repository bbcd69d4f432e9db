"""Kernels that move data: inputs, gathers, embeddings, quantisation."""

from dataclasses import dataclass
from typing import ClassVar

from cram_jax.engine import arithmetic
from cram_jax.engine.code import Kernel, Value
from cram_jax.engine.kernels.base import KernelSpec, share


@dataclass(frozen=True)
class LoadInput(KernelSpec):
    """Channels-last floats of the caller to (channels, columns).

    Column n is ``x[index[n] : index[n] + channels]``, or ``fill`` where the mask is 0.

    Attributes:
      int8: store bytes, four channels in a lane.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("x", "y", "index", "mask", "channels", "stride", "vectors", "jobs"),
        *("inverse", "zero", "fill"),
    )

    int8: bool

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        x, y, index, mask = (k.pointer_argument(name) for name in self.arguments[:4])
        channels, stride = k.int_argument("channels"), k.int_argument("stride")
        inverse, zero = k.float_argument("inverse"), k.float_argument("zero")
        fill = k.word_argument("fill")
        last = k.plus(channels, -1)

        def vector(v: Value) -> None:
            column = k.times(v, k.lanes)
            where = k.load(index, column, k.ints)
            valid = k.load(mask, column, k.ints)

            def channel(c: Value) -> Value:
                return k.gather(k.at(x, c), where)

            def unit(u: Value) -> None:
                rows = []
                for place in range(4):
                    c = k.plus(k.times(u, 4), place)
                    # Weights after the last channel are zero, so any number will do.
                    is_last = k.build.icmp_signed("<", c, last)
                    row = channel(k.build.select(is_last, c, last))
                    rows.append(k.add(k.mul(row, inverse), zero))
                packed = arithmetic.pack(k, rows)
                at = k.plus(k.times(u, stride), column)
                k.store(k.where(valid, packed, fill), y, at)

            def row(c: Value) -> None:
                at = k.plus(k.times(c, stride), column)
                value = k.cast(channel(c), k.ints)
                k.store(k.where(valid, value, fill), y, at)

            if self.int8:
                units, _ = k.divide(k.plus(channels, 3), 4)
                k.loop(0, units, unit)
            else:
                k.loop(0, channels, row)

        k.loop(*share(k, k.int_argument("vectors")), vector)


@dataclass(frozen=True)
class Gather(KernelSpec):
    """``y[r, n] = x[base[r] + index[n]]``, or ``fill`` where the mask is 0."""

    arguments: ClassVar[tuple[str, ...]] = (
        *("x", "y", "base", "index", "mask", "stride", "rows", "vectors", "jobs"),
        "fill",
    )

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        x, y, base, index, mask = (k.pointer_argument(n) for n in self.arguments[:5])
        stride, vectors = k.int_argument("stride"), k.int_argument("vectors")
        fill = k.word_argument("fill")

        def row(r: Value) -> None:
            source = k.at(x, k.index(base, r))

            def vector(v: Value) -> None:
                column = k.times(v, k.lanes)
                value = k.gather(source, k.load(index, column, k.ints), k.ints)
                valid = k.load(mask, column, k.ints)
                at = k.plus(k.times(r, stride), column)
                k.store(k.where(valid, value, fill), y, at)

            k.loop(0, vectors, vector)

        k.loop(*share(k, k.int_argument("rows")), row)


@dataclass(frozen=True)
class Embed(KernelSpec):
    """``y[f, n] = table[ids[n], f]``, plus ``residual[f, n]``.

    Attributes:
      residual: whether there is one.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("ids", "table", "y", "residual", "features", "stride", "vectors", "jobs"),
    )

    residual: bool

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        ids, table, y, residual = (k.pointer_argument(n) for n in self.arguments[:4])
        features, stride = k.int_argument("features"), k.int_argument("stride")
        width = k.word_argument("features")

        def vector(v: Value) -> None:
            column = k.times(v, k.lanes)
            where = k.build.mul(k.load(ids, column, k.ints), width)

            def feature(f: Value) -> None:
                at = k.plus(k.times(f, stride), column)
                value = k.gather(k.at(table, f), where)
                if self.residual:
                    value = k.add(value, k.load(residual, at))
                k.store(value, y, at)

            k.loop(0, features, feature)

        k.loop(*share(k, k.int_argument("vectors")), vector)


@dataclass(frozen=True)
class Quantise(KernelSpec):
    """Floats to bytes, four rows in a lane; rows behind the last are zero.

    Attributes:
      remainder: rows behind the last four.
      masked: whether columns outside of an image are set to ``fill``.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("x", "y", "mask", "stride", "units", "vectors", "jobs"),
        *("inverse", "zero", "fill"),
    )

    remainder: int
    masked: bool

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        x, y, mask = (k.pointer_argument(name) for name in self.arguments[:3])
        stride, units = k.int_argument("stride"), k.int_argument("units")
        inverse, zero = k.float_argument("inverse"), k.float_argument("zero")
        fill = k.word_argument("fill")

        def unit(u: Value, column: Value, rows: int = 4) -> None:
            values = []
            for place in range(rows):
                row = k.plus(k.times(u, 4), place)
                value = k.load(x, k.plus(k.times(row, stride), column))
                values.append(k.add(k.mul(value, inverse), zero))
            values += [k.constant(0)] * (4 - rows)
            packed = arithmetic.pack(k, values)
            if self.masked:
                packed = k.where(k.load(mask, column, k.ints), packed, fill)
            k.store(packed, y, k.plus(k.times(u, stride), column))

        def vector(v: Value) -> None:
            column = k.times(v, k.lanes)
            k.loop(0, units, lambda u: unit(u, column))
            if self.remainder:
                unit(units, column, self.remainder)

        k.loop(*share(k, k.int_argument("vectors")), vector)
