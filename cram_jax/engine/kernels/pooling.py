"""Kernels over the positions of images: pools and the mean."""

from dataclasses import dataclass
from typing import ClassVar

from cram_jax.engine import arithmetic
from cram_jax.engine.code import Kernel, Value
from cram_jax.engine.kernels.base import LOWEST, KernelSpec, share
from cram_jax.engine.llvm import ir

_BLOCK = 2**24
"""Vectors of bytes that are added up in 32 bits: 255 times as much fits."""


@dataclass(frozen=True)
class Pool(KernelSpec):
    """Combines, for every column, the lanes at ``index[tap, n]``.

    Attributes:
      kind: "max", "max_u8", or "mean", which weighs each lane by ``weight[tap, n]``.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("x", "y", "index", "weight", "mask", "taps", "columns", "x_stride"),
        *("stride", "rows", "vectors", "jobs", "fill"),
    )

    kind: str

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        x, y, index, weight, mask = (k.pointer_argument(n) for n in self.arguments[:5])
        taps, columns = k.int_argument("taps"), k.int_argument("columns")
        x_stride, stride = k.int_argument("x_stride"), k.int_argument("stride")
        vectors, fill = k.int_argument("vectors"), k.word_argument("fill")

        def row(r: Value) -> None:
            source = k.at(x, k.times(r, x_stride))

            def vector(v: Value) -> None:
                column = k.times(v, k.lanes)

                def tap(i: Value, total: Value) -> list[Value]:
                    at = k.plus(k.times(i, columns), column)
                    value = k.gather(source, k.load(index, at, k.ints), total.type)
                    if self.kind == "mean":
                        return [k.fma(value, k.load(weight, at), total)]
                    return [self._larger(k, value, total)]

                initial = {
                    "max": k.constant(LOWEST),
                    "max_u8": k.int_constant(0),
                    "mean": k.constant(0),
                }[self.kind]
                (total,) = k.loop(0, taps, tap, [initial])
                valid = k.load(mask, column, k.ints)
                value = k.where(valid, k.cast(total, k.ints), fill)
                k.store(value, y, k.plus(k.times(r, stride), column))

            k.loop(0, vectors, vector)

        k.loop(*share(k, k.int_argument("rows")), row)

    def _larger(self, k: Kernel, x: Value, y: Value) -> Value:
        if self.kind == "max":
            return k.maximum(x, y)
        octets = ir().VectorType(k.i8, 4 * k.lanes)
        a, b = k.cast(x, octets), k.cast(y, octets)
        larger = k.build.select(k.build.icmp_unsigned(">", a, b), a, b)
        return k.cast(larger, k.ints)


@dataclass(frozen=True)
class MeanOfImages(KernelSpec):
    """``y[c, b]``: the mean of channel c over the positions of image b.

    Attributes:
      int8: bytes in; four channels for every row of x.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("x", "y", "x_stride", "stride", "rows", "items", "item", "columns", "jobs"),
        *("scale", "pad"),
    )

    int8: bool

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        x, y = k.pointer_argument("x"), k.pointer_argument("y")
        x_stride, stride = k.int_argument("x_stride"), k.int_argument("stride")
        item, columns = k.int_argument("item"), k.int_argument("columns")
        scale, pad = k.float_argument("scale"), k.float_argument("pad")
        zero = k.int_constant(0) if self.int8 else k.constant(0)
        nothing = k.integer(0) if self.int8 else ir().Constant(k.f32, 0.0)
        places = 4 if self.int8 else 1

        def row(r: Value) -> None:
            def image(b: Value) -> None:
                start = k.plus(k.times(r, x_stride), k.times(b, item))

                def add_up(n: Value, *sums: Value) -> list[Value]:
                    lanes = k.load(x, k.plus(start, n), zero.type)
                    left = k.splat(k.build.trunc(k.build.sub(columns, n), k.i32))
                    inside = k.build.icmp_signed("<", k.lane_numbers(), left)
                    lanes = k.build.select(inside, lanes, zero)
                    if not self.int8:
                        return [k.add(sums[0], lanes)]
                    return [
                        k.build.add(total, arithmetic.unpack(k, lanes, place))
                        for place, total in enumerate(sums)
                    ]

                def block(first: Value, *totals: Value) -> list[Value]:
                    stop = k.plus(first, _BLOCK * k.lanes)
                    is_last = k.build.icmp_signed("<", columns, stop)
                    stop = k.build.select(is_last, columns, stop)
                    sums = k.loop(first, stop, add_up, [zero] * places, step=k.lanes)
                    pairs = zip(totals, sums, strict=True)
                    return [_across(k, total, lanes) for total, lanes in pairs]

                initial = [nothing] * places
                totals = k.loop(0, columns, block, initial, step=_BLOCK * k.lanes)
                for place, total in enumerate(totals):
                    if self.int8:
                        total = k.build.sitofp(total, k.f32)
                    value = k.mul(k.sub(k.splat(total), pad), scale)
                    first = k.build.extract_element(value, ir().Constant(k.i32, 0))
                    channel = k.plus(k.times(r, places), place)
                    k.store_scalar(first, y, k.plus(k.times(channel, stride), b))

            k.loop(0, k.int_argument("items"), image)

        k.loop(*share(k, k.int_argument("rows")), row)


def _across(k: Kernel, total: Value, lanes: Value) -> Value:
    """A total plus all lanes, in 64 bits if they are unsigned integers."""
    is_int = lanes.type == k.ints
    add = k.build.add if is_int else k.build.fadd
    terms = [
        k.build.extract_element(lanes, ir().Constant(k.i32, i)) for i in range(k.lanes)
    ]
    if is_int:
        terms = [k.build.zext(term, k.i64) for term in terms]
    while len(terms) > 1:
        terms = [add(a, b) for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return add(total, terms[0])
