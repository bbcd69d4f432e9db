"""Sparse weights: which blocks are present, and their values."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cram_jax.engine.kernels import UNIT
from cram_jax.engine.targets import Target

_HALF = 64
"""Two weights of this size, times 255, add up to 16 bits at most."""


class Terms(NamedTuple):
    """What a kernel adds up, ordered by output.

    Attributes:
      ends: (groups + 1,) int32, where those of each group of outputs begin and end.
      positions: (terms,) int32, among lanes * taps.
      words: int32, the weights: ``rows * Target.weight_words`` of each term.
    """

    ends: np.ndarray
    positions: np.ndarray
    words: np.ndarray


@dataclass(frozen=True, eq=False)
class SparseWeights:
    """The non-zero blocks of a kernel, ordered by output, then channel, then tap.

    A block is ``rows`` outputs of one lane: one input in float32, four in INT8. Outputs
    are padded to a multiple of 4, inputs of INT8 too.

    Attributes:
      window: height and width of the kernel.
      inputs: channels in.
      outputs: channels out.
      rows: outputs of a block: 1, 2 or 4.
      occupied: (groups of outputs, lanes * taps), True for blocks that are present.
      values: (blocks, rows) float32, or (blocks, rows, 4) int8.
      scale: (outputs,) float32, what an integer stands for; None in float32.
    """

    window: tuple[int, int]
    inputs: int
    outputs: int
    rows: int
    occupied: np.ndarray
    values: np.ndarray
    scale: np.ndarray | None = None

    @property
    def int8(self) -> bool:
        """Whether the values are integers."""
        return self.values.dtype == np.int8

    @property
    def lanes(self) -> int:
        """Lanes of an input column."""
        return lanes_of(self.inputs, self.int8)

    @property
    def taps(self) -> int:
        """Positions of the window."""
        return self.window[0] * self.window[1]

    @property
    def padded_outputs(self) -> int:
        """Outputs rounded up to what is computed together."""
        return round_up(self.outputs, UNIT)

    def terms(self, target: Target) -> Terms:
        """The blocks as the kernels of a target read them; all plans share them."""
        if not self.int8 or (target.weight_words == 1 and not target.pairs):
            return self._blocks
        return self._in_pairs if target.pairs else self._even_odd

    def sums(self) -> np.ndarray:
        """(padded outputs,) int64: the sum of each output's integers."""
        return self._by_output(self.values.astype(np.int64).sum(axis=-1))

    def absolute_sums(self) -> np.ndarray:
        """(padded outputs,) int64: the sum of the integers' magnitudes."""
        return self._by_output(np.abs(self.values.astype(np.int64)).sum(axis=-1))

    def _by_output(self, blocks: np.ndarray) -> np.ndarray:
        groups = np.nonzero(self.occupied)[0]
        total = np.zeros((len(self.occupied), self.rows), np.int64)
        np.add.at(total, groups, blocks)
        return total.reshape(-1)

    @cached_property
    def _blocks(self) -> Terms:
        counts = self.occupied.sum(axis=1, dtype=np.int64)
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        positions = np.nonzero(self.occupied)[1].astype(np.int32)
        return Terms(ends, positions, _words(self.values))

    @cached_property
    def _even_odd(self) -> Terms:
        even_odd = self.values.astype(np.int16)[..., [0, 2, 1, 3]]
        return self._blocks._replace(words=_words(even_odd))

    @cached_property
    def _in_pairs(self) -> Terms:
        """Blocks whose pairs could exceed 16 bits are there twice, in two parts."""
        whole = self._blocks
        large = _overflow(self.values).any(axis=1)
        times = 1 + large.astype(np.int64)
        values = np.repeat(self.values, times, axis=0)
        first = np.cumsum(times)[large] - 2
        part = np.clip(self.values[large], -_HALF, _HALF)
        values[first], values[first + 1] = part, self.values[large] - part
        before = np.concatenate([[0], np.cumsum(times)])
        return Terms(
            before[whole.ends].astype(np.int32),
            np.repeat(whole.positions, times),
            _words(values),
        )

    def dense(self) -> np.ndarray:
        """The kernel (height, width, inputs, outputs), in float32 or integers."""
        width = 4 if self.int8 else 1
        groups, places = self.occupied.shape
        full = np.zeros((groups, places, self.rows, width), self.values.dtype)
        full[self.occupied] = self.values.reshape(-1, self.rows, width)
        full = full.reshape(groups, self.lanes, self.taps, self.rows, width)
        # taps, lanes and width, groups and rows
        moved = full.transpose(2, 1, 4, 0, 3)
        kernel = moved.reshape(self.taps, self.lanes * width, groups * self.rows)
        kernel = kernel[:, : self.inputs, : self.outputs]
        return kernel.reshape(*self.window, self.inputs, self.outputs)


def pack_kernel(
    kernel: np.ndarray, target: Target, scale: np.ndarray | None = None
) -> SparseWeights:
    """Finds the blocks of a kernel (height, width, inputs, outputs).

    Args:
      kernel: float32 weights, or int8 ones with their scale.
      target: what runs them; it decides how many outputs share a block.
      scale: (outputs,), for int8.

    Returns:
      The weights, with the number of outputs in a block that costs least.
    """
    height, width, inputs, outputs = kernel.shape
    is_int8 = kernel.dtype == np.int8
    lanes, depth = lanes_of(inputs, is_int8), 4 if is_int8 else 1
    taps = height * width
    padded = np.zeros((taps, lanes * depth, round_up(outputs, UNIT)), kernel.dtype)
    padded[:, :inputs, :outputs] = kernel.reshape(taps, inputs, outputs)
    by_output = padded.reshape(taps, lanes, depth, -1).transpose(3, 1, 0, 2)
    split = np.ascontiguousarray(by_output).reshape(-1, lanes * taps, depth)
    nonzero = (split != 0).any(axis=2)
    twice = np.zeros_like(nonzero)
    if is_int8 and target.pairs:
        twice[nonzero] = _overflow(split[nonzero])

    def by_rows(found: np.ndarray, rows: int) -> np.ndarray:
        groups = found.reshape(-1, rows, lanes * taps)
        return np.asarray(groups.any(axis=1))

    def cost(rows: int) -> float:
        terms = by_rows(nonzero, rows).sum() + by_rows(twice, rows).sum()
        return float(terms) * _cost(rows, is_int8, target)

    rows = min((1, 2, 4), key=cost)
    occupied = by_rows(nonzero, rows)
    grouped = split.reshape(-1, rows, lanes * taps, depth).transpose(0, 2, 1, 3)
    values: np.ndarray = grouped[occupied]
    if not is_int8:
        values = values[..., 0]
    values = np.ascontiguousarray(values)
    return SparseWeights(
        (height, width),
        inputs,
        outputs,
        rows,
        occupied,
        values,
        scale,
    )


def _cost(rows: int, is_int8: bool, target: Target) -> float:
    """Time for a term and a vector: shared loads, and the instructions of every row."""
    if is_int8 and target.weight_words == 2:
        return 3 + 4 * rows
    return 1 + (2 if is_int8 and target.pairs else 1) * rows


def _overflow(values: np.ndarray) -> np.ndarray:
    """Whether bytes times a pair of weights, of (..., 4), can exceed 16 bits.

    They can if both have one sign; else the larger one alone is the worst case.
    """
    sums = values[..., 0::2].astype(np.int16) + values[..., 1::2]
    return np.asarray((np.abs(sums) > 2 * _HALF).any(axis=-1))


def _words(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.int32).reshape(-1)


def lanes_of(channels: int, int8: bool) -> int:
    """32-bit lanes that hold the channels of a column."""
    return -(-channels // 4) if int8 else channels


def round_up(size: int, unit: int) -> int:
    """The next multiple."""
    return -(-size // unit) * unit
