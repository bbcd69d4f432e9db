"""Multi-head attention, a few vectors of queries at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cram_jax.engine import arithmetic
from cram_jax.engine.code import Kernel, Value
from cram_jax.engine.kernels.base import LOWEST, KernelSpec


@dataclass(frozen=True)
class Attend(KernelSpec):
    """One job: ``tile`` vectors of queries of one head of one sequence.

    Scores are (keys, queries), so that the softmax is a sum of vectors.

    Attributes:
      tile: vectors of queries.
      rows: keys, or features of the value, that share what is loaded.
      masked: whether keys may be padding.
      octets: store bytes, four features in a lane; ``rows`` is 4 and divides the depth.
    """

    arguments: ClassVar[tuple[str, ...]] = (
        *("query", "key", "value", "mask", "y", "scratch", "scratch_size"),
        *("stride", "item", "length", "heads", "depth", "first", "parts"),
        *("scale", "inverse", "zero"),
    )

    tile: int
    rows: int
    masked: bool
    octets: bool

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        tile, width = range(self.tile), self.tile * k.lanes
        stride, length = k.int_argument("stride"), k.int_argument("length")
        depth, item = k.int_argument("depth"), k.int_argument("item")
        head_of, part = k.divide(k.job, k.int_argument("parts"))
        sequence, head = k.divide(head_of, k.int_argument("heads"))
        start = k.times(sequence, item)
        column = k.plus(start, k.int_argument("first"), k.times(part, width))
        first_row = k.times(k.times(head, depth), stride)
        query, key, value = (
            k.at(k.pointer_argument(name), first_row)
            for name in ("query", "key", "value")
        )
        own = k.times(k.thread, k.int_argument("scratch_size"))
        scratch = k.at(k.pointer_argument("scratch"), own)
        mask = k.at(k.pointer_argument("mask"), start)
        scale = k.float_argument("scale")

        def scores(j: Value, top: Sequence[Value], rows: int) -> list[Value]:
            """Stores the scores of keys j to j + rows; keeps the largest."""
            sums = _product(
                k,
                rows,
                self.tile,
                depth,
                lambda r, d: k.scalar(key, k.plus(k.times(d, stride), start, j, r)),
                lambda d: [
                    k.load(query, k.plus(k.times(d, stride), column, t * k.lanes))
                    for t in tile
                ],
            )
            top = list(top)
            for r in range(rows):
                row = k.plus(j, r)
                for t in tile:
                    score = k.mul(sums[r * self.tile + t], scale)
                    if self.masked:
                        is_token = k.splat(k.scalar(mask, row, k.i32))
                        score = k.where(is_token, score, k.constant(LOWEST))
                    k.store(score, scratch, k.plus(k.times(row, width), t * k.lanes))
                    top[t] = k.max(score, top[t])
            return top

        top = in_rows(k, length, self.rows, scores, [k.constant(LOWEST)] * self.tile)

        def exponentials(j: Value, *totals: Value) -> list[Value]:
            results = []
            for t in tile:
                at = k.plus(k.times(j, width), t * k.lanes)
                e = arithmetic.exp(k, k.sub(k.load(scratch, at), top[t]))
                k.store(e, scratch, at)
                results.append(k.add(totals[t], e))
            return results

        totals = k.loop(0, length, exponentials, [k.constant(0)] * self.tile)
        shares = [k.div(k.constant(1), total) for total in totals]
        store = _Store(k, self, first_row, column)

        def outputs(d: Value, nothing: Sequence[Value], rows: int) -> list[Value]:
            sums = _product(
                k,
                rows,
                self.tile,
                length,
                lambda r, j: k.scalar(
                    value, k.plus(k.times(k.plus(d, r), stride), start, j)
                ),
                lambda j: [
                    k.load(scratch, k.plus(k.times(j, width), t * k.lanes))
                    for t in tile
                ],
            )
            sums = [k.mul(x, shares[i % self.tile]) for i, x in enumerate(sums)]
            store(d, sums, rows)
            return []

        in_rows(k, depth, self.rows, outputs, [])


class _Store:
    """Stores features d to d + rows, as floats or bytes."""

    def __init__(self, k: Kernel, spec: Attend, first_row: Value, column: Value):
        self.k, self.spec, self.column = k, spec, column
        self.y = k.pointer_argument("y")
        self.stride = k.int_argument("stride")
        self.inverse, self.zero = k.float_argument("inverse"), k.float_argument("zero")
        if spec.octets:
            first_row, _ = k.divide(first_row, 4)
        self.first_row = first_row

    def __call__(self, d: Value, sums: Sequence[Value], rows: int) -> None:
        k, tile = self.k, self.spec.tile
        for t in range(tile):
            column = k.plus(self.first_row, self.column, t * k.lanes)
            values = [sums[r * tile + t] for r in range(rows)]
            if not self.spec.octets:
                for r, value in enumerate(values):
                    row = k.times(k.plus(d, r), self.stride)
                    k.store(value, self.y, k.plus(row, column))
            elif rows == 4:
                scaled = [k.add(k.mul(v, self.inverse), self.zero) for v in values]
                packed = arithmetic.pack(k, scaled)
                unit, _ = k.divide(d, 4)
                k.store(packed, self.y, k.plus(k.times(unit, self.stride), column))


def _product(
    k: Kernel,
    rows: int,
    tile: int,
    depth: Value,
    scalar: Callable[[int, Value], Value],
    vectors: Callable[[Value], list[Value]],
) -> list[Value]:
    """Sums over ``depth`` of a scalar for each row times the same ``tile`` vectors."""

    def accumulate(i: Value, *totals: Value) -> list[Value]:
        operands = vectors(i)
        results = []
        for r in range(rows):
            weight = k.splat(scalar(r, i))
            for t, operand in enumerate(operands):
                total = totals[r * len(operands) + t]
                results.append(k.fma(weight, operand, total))
        return results

    return k.loop(0, depth, accumulate, [k.constant(0)] * (rows * tile))


def in_rows(
    k: Kernel,
    total: Value,
    rows: int,
    body: Callable[[Value, Sequence[Value], int], list[Value]],
    carried: list[Value],
) -> list[Value]:
    """Runs the body for ``rows`` at a time, then for what remains, one at a time."""
    whole, _ = k.divide(total, rows)
    end = k.times(whole, rows)
    carried = k.loop(0, end, lambda i, *c: body(i, c, rows), carried, step=rows)
    if rows == 1:
        return carried
    return k.loop(end, total, lambda i, *c: body(i, c, 1), carried)
