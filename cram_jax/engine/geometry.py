"""Where the positions of tensors lie among the columns of their buffers.

Every tensor is (channels, columns). Columns are the batch for features, tokens for
sequences, and positions of zero-padded planes for images: a row ends in ``gap``
columns, which also pad the next one, and an image in ``gap`` rows. So a tap of a
convolution is a shift of all columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cram_jax.engine.packing import round_up

_LINE = 16
"""32-bit lanes of a line of the cache."""


@dataclass(eq=False)
class Grid:
    """The columns of tensors that share a layout.

    Attributes:
      batch: items.
      lanes: of a vector.
      size: height and width of the largest image; (1, length) of a sequence; (1, 1).
      gap: rows and columns of padding.
      unit: the number of columns of an item is a multiple of it.
    """

    batch: int
    lanes: int
    size: tuple[int, int]
    gap: tuple[int, int] = (0, 0)
    unit: int = 1
    _cached: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    @property
    def pitch(self) -> int:
        """Columns from one row to the next."""
        return self.size[1] + self.gap[1]

    @property
    def item(self) -> int:
        """Columns from one item to the next."""
        return round_up((self.size[0] + self.gap[0]) * self.pitch, self.unit)

    @property
    def columns(self) -> int:
        """Columns that are computed; behind them there is padding only."""
        return (self.batch - 1) * self.item + self.size[0] * self.pitch

    @property
    def vectors(self) -> int:
        """Vectors of columns that are computed."""
        return -(-self.columns // self.lanes)

    @property
    def stride(self) -> int:
        """Lanes from one channel to the next."""
        stride = max(
            round_up(self.batch * self.item, self.lanes), self.vectors * self.lanes
        )
        # Tiles of channels that are a power of two apart would share a few sets of the
        # cache and leave the others empty.
        return stride + _LINE if stride % (8 * _LINE) == 0 else stride

    @property
    def margin(self) -> int:
        """Lanes before the first channel and behind the last, which taps may read."""
        reach = self.gap[0] * self.pitch + self.gap[1]
        return round_up(reach + 16 * self.lanes, self.lanes)

    def require(self, size: Sequence[int], gap: Sequence[int] = (0, 0)) -> None:
        """Makes room for images of this size, and for padding."""
        self.size = max(self.size[0], size[0]), max(self.size[1], size[1])
        self.gap = max(self.gap[0], gap[0]), max(self.gap[1], gap[1])

    def places(self, size: tuple[int, int]) -> np.ndarray:
        """(batch, height, width): the columns of an image's positions."""
        rows = np.arange(size[0])[:, None] * self.pitch + np.arange(size[1])
        return np.arange(self.batch)[:, None, None] * self.item + rows

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """(stride,) int32: -1 in an image of this size, 0 outside."""
        if size not in self._cached:
            mask = np.zeros(self.stride, np.int32)
            mask[self.places(size)] = -1
            self._cached[size] = mask
        return self._cached[size]

    def spread(self, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(..., stride): values (..., batch, height, width) at their columns."""
        values = np.asarray(values)
        spread = np.zeros((*values.shape[:-3], self.stride), values.dtype)
        spread[..., self.places(size)] = values
        return spread
