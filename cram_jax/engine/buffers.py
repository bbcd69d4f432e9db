"""Buffers of a plan, and the operations that read and write them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cram_jax.engine.geometry import Grid
from cram_jax.engine.kernels import KernelSpec

ALIGNMENT = 64


@dataclass(eq=False)
class Buffer:
    """A tensor in memory: (rows, columns) of 32-bit lanes in a grid.

    Attributes:
      rows: channels, or groups of four for bytes; a multiple of 4 for floats.
      grid: where its columns lie.
      form: "f32" or "u8".
      fill: the 32 bits of padding.
    """

    rows: int
    grid: Grid
    form: str
    fill: int
    _memory: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        lanes = self.rows * self.grid.stride + 2 * self.grid.margin
        if lanes >= 2**31:
            raise ValueError(
                f"batch or images are too large: a tensor needs {lanes} numbers"
            )
        self._memory = aligned(lanes, np.int32)
        self._memory[:] = np.uint32(self.fill).view(np.int32)

    @property
    def key(self) -> tuple[Any, ...]:
        """Buffers of equal keys may stand in for each other."""
        return self.rows, id(self.grid), self.form, self.fill

    @property
    def address(self) -> int:
        """Of the first column of the first row."""
        return int(self._memory.ctypes.data) + 4 * self.grid.margin

    @property
    def nbytes(self) -> int:
        """Bytes of all columns that are computed."""
        return 4 * self.rows * self.grid.vectors * self.grid.lanes

    def lanes(self) -> np.ndarray:
        """(rows, stride) int32, a view."""
        start, stride = self.grid.margin, self.grid.stride
        return self._memory[start : start + self.rows * stride].reshape(-1, stride)

    def positions(self, size: tuple[int, int]) -> np.ndarray:
        """(batch, height, width, rows) int32 of images of a size, a view."""
        grid, step = self.grid, self._memory.itemsize
        return np.lib.stride_tricks.as_strided(
            self._memory[grid.margin :],
            (grid.batch, *size, self.rows),
            (grid.item * step, grid.pitch * step, step, grid.stride * step),
        )

    def floats(self, channels: int, size: tuple[int, int]) -> np.ndarray:
        """(batch, height, width, channels) of a buffer of floats, a view."""
        return self.positions(size).view(np.float32)[..., :channels]

    def octets(self, channels: int, size: tuple[int, int]) -> np.ndarray:
        """(batch, height, width, channels) uint8 of a buffer of bytes."""
        octets = np.ascontiguousarray(self.positions(size))
        return octets.view(np.uint8)[..., :channels]


@dataclass(eq=False)
class Step:
    """One kernel with its arguments.

    Attributes:
      node: the node whose result it contributes to.
      spec: the kernel.
      words: its arguments, by name: an integer, a float, an address, or an array that
        stands for its address.
      jobs: how many there are.
      reads: buffers it reads.
      writes: buffers it writes.
      multiply_adds: in all jobs together, without zeros.
      nbytes: of weights and buffers that it touches.
    """

    node: str
    spec: KernelSpec
    words: Mapping[str, Any]
    jobs: int
    reads: tuple[Buffer, ...] = ()
    writes: tuple[Buffer, ...] = ()
    multiply_adds: int = 0
    nbytes: int = 0

    def encode(self) -> np.ndarray:
        """The 64-bit words of the kernel's arguments."""
        encoded = np.zeros(len(self.spec.arguments), np.int64)
        for i, name in enumerate(self.spec.arguments):
            value = self.words.get(name, 0)
            if isinstance(value, np.ndarray):
                value = value.ctypes.data
            if isinstance(value, float | np.float32):
                encoded[i : i + 1].view(np.float32)[0] = value
            else:
                encoded[i] = value
        return encoded


def aligned(size: int, dtype: Any) -> np.ndarray:
    """An uninitialised array that starts at a cache line."""
    itemsize = np.dtype(dtype).itemsize
    raw = np.empty(size * itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size * itemsize].view(dtype)


def tiles_of(vectors: int, tile: int) -> Iterable[tuple[int, int, int]]:
    """Divides vectors into tiles of at most ``tile``, of nearly equal size.

    Yields:
      Vectors of a tile, how many such tiles there are, and where they start.
    """
    parts = -(-vectors // tile)
    large = -(-vectors // parts)
    count = vectors - parts * (large - 1)
    yield large, count, 0
    if count < parts:
        yield large - 1, parts - count, count * large
