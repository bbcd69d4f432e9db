"""Attention of bytes: integer scores and sums around a float32 softmax.

Queries, keys and values are bytes, four features in a lane. Keys are signed numbers
that multiply vectors of queries, and values multiply vectors of weights; a lane holds
four features of the first product and four keys of the second. So keys are made signed
and values transposed beforehand, once for all queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cram_jax.engine import arithmetic
from cram_jax.engine.code import MAGIC, Kernel, Value
from cram_jax.engine.kernels.attention import in_rows
from cram_jax.engine.kernels.base import LOWEST, KernelSpec, share
from cram_jax.engine.llvm import ir

_SIGNS = 0x80808080


@dataclass(frozen=True)
class SignKeys(KernelSpec):
    """Keys less 128, as `arithmetic.dot` reads weights, and where scores start.

    The score of a key starts at minus the zero point of queries times the sum of the
    key. What the zero point of keys would add is the same for all keys of a query, and
    a softmax ignores it.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("key", "y", "starts", "stride", "vectors", "heads", "units", "jobs"),
        "query_zero",
    )

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        key, y, starts = (k.pointer_argument(n) for n in self.arguments[:3])
        stride, units = k.int_argument("stride"), k.int_argument("units")
        vectors, zero = k.int_argument("vectors"), k.word_argument("query_zero")
        ones = arithmetic.ones(k)

        def head(h: Value) -> None:
            first = k.times(h, units)

            def vector(v: Value) -> None:
                column = k.times(v, k.lanes)

                def unit(u: Value, total: Value) -> list[Value]:
                    row = k.plus(first, u)
                    word = k.load(key, k.plus(k.times(row, stride), column), k.ints)
                    _store_signed(k, word, y, row, stride, column)
                    split = arithmetic.split_bytes(k, word)
                    return [arithmetic.dot(k, total, split, ones)]

                (total,) = k.loop(0, units, unit, [k.int_constant(0)])
                features = k.splat(k.build.trunc(k.times(units, 4 * 128), k.i32))
                total = k.build.mul(k.build.sub(features, total), zero)
                at = k.plus(k.times(h, stride), column)
                k.store(total, starts, at)

            k.loop(0, vectors, vector)

        k.loop(*share(k, k.int_argument("heads")), head)


@dataclass(frozen=True)
class TransposeValues(KernelSpec):
    """Values less 128 with four neighbouring columns in a lane, a row for a feature."""

    arguments: ClassVar[tuple[str, ...]] = (
        *("value", "y", "stride", "quarter", "vectors", "units", "jobs"),
    )

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        value, y = k.pointer_argument("value"), k.pointer_argument("y")
        stride, quarter = k.int_argument("stride"), k.int_argument("quarter")
        vectors, types = k.int_argument("vectors"), ir()
        wide = types.VectorType(k.i32, 4 * k.lanes)
        octets = types.VectorType(k.i8, 4 * k.lanes)

        def unit(u: Value) -> None:
            def vector(v: Value) -> None:
                at = k.plus(k.times(u, stride), k.times(v, 4 * k.lanes))
                words = k.load(value, at, wide)
                for feature in range(4):
                    by = types.Constant(wide, [8 * feature] * (4 * k.lanes))
                    column = k.build.trunc(k.build.lshr(words, by), octets)
                    row = k.plus(k.times(u, 4), feature)
                    packed = k.cast(column, k.ints)
                    _store_signed(k, packed, y, row, quarter, k.times(v, k.lanes))

            k.loop(0, vectors, vector)

        k.loop(*share(k, k.int_argument("units")), unit)


@dataclass(frozen=True)
class AttendBytes(KernelSpec):
    """One job: ``tile`` vectors of queries of one head of one sequence.

    With ``e = exp(score - largest)`` a weight is ``255 * e``, rounded, and what
    rounding leaves goes to the next key: many small weights would otherwise all be
    lost. The result is ``sum(weight * value) * (unit / sum(weight)) + offset``: weights
    still add up to one, and the zero point of values is a constant.

    Attributes:
      tile: vectors of queries.
      masked: whether keys may be padding.
      octets: store bytes, four features in a lane; else floats.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("query", "key", "starts", "value", "mask", "y", "scratch", "scratch_size"),
        *("stride", "quarter", "item", "length", "heads", "depth", "first", "parts"),
        *("scale", "unit", "offset"),
    )

    tile: int
    masked: bool
    octets: bool

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        head_of, part = k.divide(k.job, k.int_argument("parts"))
        sequence, head = k.divide(head_of, k.int_argument("heads"))
        start = k.times(sequence, k.int_argument("item"))
        column = k.plus(
            start,
            k.int_argument("first"),
            k.times(part, self.tile * k.lanes),
        )
        own = k.times(k.thread, k.int_argument("scratch_size"))
        scores = k.at(k.pointer_argument("scratch"), own)
        length = k.int_argument("length")
        groups, _ = k.divide(k.plus(length, 3), 4)
        weights = k.at(scores, k.times(groups, 4 * self.tile * k.lanes))
        largest = self._scores(k, scores, head, start, column)
        totals = self._weights(k, scores, weights, groups, largest)
        self._sums(k, weights, groups, totals, head, start, column)

    def _scores(
        self, k: Kernel, scores: Value, head: Value, start: Value, column: Value
    ) -> list[Value]:
        """Stores the scores, (keys, queries); returns the largest of every query."""
        words, tile = k.target.words, range(self.tile)
        stride, length = k.int_argument("stride"), k.int_argument("length")
        units, _ = k.divide(k.int_argument("depth"), 4)
        first = k.times(head, units)
        query = k.at(
            k.pointer_argument("query"), k.plus(k.times(first, stride), column)
        )
        key = k.at(k.pointer_argument("key"), k.times(k.times(first, words), stride))
        starts = k.at(k.pointer_argument("starts"), k.times(head, stride))
        mask, scale = k.pointer_argument("mask"), k.float_argument("scale")

        def keys(j: Value, top: Sequence[Value], rows: int) -> list[Value]:
            own = k.plus(start, j)
            initial = [
                k.splat(k.scalar(starts, k.plus(own, r), k.i32))
                for r in range(rows)
                for _ in tile
            ]
            sums = _products(
                k,
                units,
                initial,
                lambda u: [
                    k.load(query, k.plus(k.times(u, stride), t * k.lanes), k.ints)
                    for t in tile
                ],
                [k.at(key, k.plus(own, r)) for r in range(rows)],
                step=k.times(stride, words),
                between=stride,
            )
            top = list(top)
            for r in range(rows):
                for t in tile:
                    total = sums[r * self.tile + t]
                    score = k.mul(k.to_float(total), scale)
                    if self.masked:
                        is_token = k.splat(k.scalar(mask, k.plus(own, r), k.i32))
                        score = k.where(is_token, score, k.constant(LOWEST))
                    k.store(score, scores, self._at(k, k.plus(j, r), t))
                    top[t] = k.max(score, top[t])
            return top

        top = in_rows(k, length, 4, keys, [k.constant(LOWEST)] * self.tile)

        def no_key(j: Value) -> None:
            for t in tile:
                k.store(k.constant(float("-inf")), scores, self._at(k, j, t))

        groups, _ = k.divide(k.plus(length, 3), 4)
        k.loop(length, k.times(groups, 4), no_key)
        return top

    def _weights(
        self,
        k: Kernel,
        scores: Value,
        weights: Value,
        groups: Value,
        largest: Sequence[Value],
    ) -> list[Value]:
        """Stores the weights as bytes, four keys in a lane; returns their sums."""
        ones = arithmetic.ones(k)

        def four(g: Value, *carried: Value) -> list[Value]:
            totals, rests = list(carried[: self.tile]), list(carried[self.tile :])
            for t in range(self.tile):
                rows = []
                for r in range(4):
                    at = self._at(k, k.plus(k.times(g, 4), r), t)
                    e = arithmetic.exp(k, k.sub(k.load(scores, at), largest[t]))
                    wanted = k.fma(e, k.constant(255), rests[t])
                    shifted = k.add(wanted, k.constant(MAGIC))
                    rows.append(k.sub(shifted, k.constant(MAGIC)))
                    rests[t] = k.sub(wanted, rows[-1])
                packed = arithmetic.pack(k, rows)
                k.store(packed, weights, self._at(k, g, t))
                split = arithmetic.split_bytes(k, packed)
                totals[t] = arithmetic.dot(k, totals[t], split, ones)
            return [*totals, *rests]

        initial = [k.int_constant(0)] * self.tile + [k.constant(0)] * self.tile
        return k.loop(0, groups, four, initial)[: self.tile]

    def _sums(
        self,
        k: Kernel,
        weights: Value,
        groups: Value,
        totals: Sequence[Value],
        head: Value,
        start: Value,
        column: Value,
    ) -> None:
        """Stores the features, four at a time."""
        words, tile = k.target.words, range(self.tile)
        stride, quarter = k.int_argument("stride"), k.int_argument("quarter")
        depth = k.int_argument("depth")
        first = k.times(head, depth)
        place, _ = k.divide(start, 4)
        own = k.plus(k.times(k.times(first, words), quarter), place)
        value, y = k.at(k.pointer_argument("value"), own), k.pointer_argument("y")
        unit, offset = k.float_argument("unit"), k.float_argument("offset")
        shares = [k.div(unit, k.to_float(total)) for total in totals]

        def features(u: Value) -> None:
            d = k.times(u, 4)
            sums = _products(
                k,
                groups,
                [k.int_constant(0)] * (4 * self.tile),
                lambda g: [k.load(weights, self._at(k, g, t), k.ints) for t in tile],
                [
                    k.at(value, k.times(k.times(k.plus(d, r), words), quarter))
                    for r in range(4)
                ],
                step=1,
                between=quarter,
            )
            for t in tile:
                rows = [
                    k.add(k.mul(k.to_float(sums[r * self.tile + t]), shares[t]), offset)
                    for r in range(4)
                ]
                lane = k.plus(column, t * k.lanes)
                if self.octets:
                    packed = arithmetic.pack(k, rows)
                    at, _ = k.divide(k.plus(first, d), 4)
                    k.store(packed, y, k.plus(k.times(at, stride), lane))
                else:
                    for r, row in enumerate(rows):
                        at = k.times(k.plus(first, d, r), stride)
                        k.store(row, y, k.plus(at, lane))

        units, _ = k.divide(depth, 4)
        k.loop(0, units, features)

    def _at(self, k: Kernel, row: Value, t: int) -> Value:
        """The lane of a vector of a row of the scratch."""
        return k.plus(k.times(row, self.tile * k.lanes), t * k.lanes)


def _products(
    k: Kernel,
    count: Value,
    initial: list[Value],
    operands: Callable[[Value], list[Value]],
    weights: Sequence[Value],
    *,
    step: int | Value,
    between: Value,
) -> list[Value]:
    """Sums over ``count`` of a word for each row times the same vectors of bytes.

    The words of a row are ``step`` lanes apart; if a word is two, as the even and the
    odd bytes, these are ``between`` lanes apart.
    """

    def accumulate(i: Value, *totals: Value) -> list[Value]:
        vectors = [arithmetic.split_bytes(k, vector) for vector in operands(i)]
        results = []
        for r, row in enumerate(weights):
            at = k.times(i, step)
            word = [
                k.splat(k.scalar(row, k.plus(at, k.times(n, between)), k.i32))
                for n in range(k.target.words)
            ]
            for t, vector in enumerate(vectors):
                total = totals[r * len(vectors) + t]
                results.append(arithmetic.dot(k, total, vector, word))
        return results

    return k.loop(0, count, accumulate, initial)


def _store_signed(
    k: Kernel, octets: Value, y: Value, row: Value, pitch: Value, column: Value
) -> None:
    """Stores unsigned bytes less 128, in as many words as `arithmetic.dot` takes."""
    signed = k.build.xor(octets, k.int_constant(_SIGNS))
    words = arithmetic.split_weights(k, signed)
    for n, word in enumerate(words):
        at = k.plus(k.times(row, len(words)), n)
        k.store(word, y, k.plus(k.times(at, pitch), column))
