"""Sparse weights: which blocks are present, and their values."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cram_jax.engine.kernels import UNIT
from cram_jax.engine.targets import Target


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

    def ends(self) -> np.ndarray:
        """Where the blocks of each group of outputs begin, and the last one ends."""
        counts = self.occupied.sum(axis=1, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    def positions(self) -> np.ndarray:
        """For every block, its position among lanes * taps."""
        return np.nonzero(self.occupied)[1].astype(np.int32)

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

    def words(self, target: Target) -> np.ndarray:
        """The values as 32-bit words, as the kernels of a target read them."""
        if not self.int8 or target.words == 1:
            return np.ascontiguousarray(self.values).view(np.int32).reshape(-1)
        return self._even_odd

    @cached_property
    def _even_odd(self) -> np.ndarray:
        """Twice the size of the values; all plans share it."""
        even_odd = self.values.astype(np.int16)[..., [0, 2, 1, 3]]
        return np.ascontiguousarray(even_odd).view(np.int32).reshape(-1)

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
    candidates = {}
    for rows in (1, 2, 4):
        occupied = nonzero.reshape(-1, rows, lanes * taps).any(axis=1)
        candidates[rows] = (
            int(occupied.sum()) * _cost(rows, is_int8, target),
            occupied,
        )
    rows = min(candidates, key=lambda r: candidates[r][0])
    occupied = candidates[rows][1]
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
    """Instructions for a block and a vector: shared loads, and those of every row."""
    if is_int8 and target.words == 2:
        return 3 + 4 * rows
    return 1 + rows


def lanes_of(channels: int, int8: bool) -> int:
    """32-bit lanes that hold the channels of a column."""
    return -(-channels // 4) if int8 else channels


def round_up(size: int, unit: int) -> int:
    """The next multiple."""
    return -(-size // unit) * unit
