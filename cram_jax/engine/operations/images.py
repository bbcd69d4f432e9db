"""Operations of images (height, width, channels)."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from cram_jax.engine.arrays import (
    Pads,
    as_pads,
    as_pair,
    conv_size,
    resolve_pads,
)
from cram_jax.engine.operations.base import (
    Operation,
    TensorType,
    expect,
    expect_features,
    floats,
    operation,
    set_array,
)
from cram_jax.validation import check_integer

_LARGEST_WINDOW = 2**18
"""Positions of a window: each has an entry in the tables that a plan makes."""

Padding: TypeAlias = int | Literal["SAME", "VALID"] | Sequence[Sequence[int]]


@operation
class Conv(Operation):
    """A convolution of images (height, width, channels), as in Flax.

    One that is grouped or dilated is one whose kernel has zeros in between: see the
    guide, "A network on one page".

    Attributes:
      kernel: (height, width, inputs, outputs).
      bias: (outputs,), or None.
      strides: one number, or one for each direction.
      padding: a number, "SAME", "VALID" or ((top, bottom), (left, right)).

    Raises:
      ValueError: an array has another shape, or an entry that is not finite; or the
        strides or the padding are out of range or of another form.
      TypeError: an array is not of numbers, or a stride or padding not an integer.

    Example:
      >>> import numpy as np
      >>> from cram_jax.engine import Conv, TensorType
      >>> conv = Conv(np.ones((3, 3, 3, 16)), strides=2)
      >>> conv.infer(TensorType((32, 32, 3)))
      TensorType(shape=(16, 16, 16), dtype='float32')
    """

    kernel: np.ndarray
    bias: np.ndarray | None = None
    strides: int | tuple[int, int] = 1
    padding: Padding = "SAME"

    def __post_init__(self) -> None:
        set_array(self, "kernel", (None,) * 4)
        set_array(self, "bias", (self.kernel.shape[3],), optional=True)
        object.__setattr__(self, "strides", as_pair("strides", self.strides))
        object.__setattr__(self, "padding", as_pads(self.padding))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1, rank=3)
        size = self.kernel.shape[2]
        is_grouped = 0 < size < x.features and x.features % size == 0
        hint = "; a grouped convolution needs zeros between the groups of its kernel"
        expect_features(x, size, "kernel's inputs", hint if is_grouped else "")
        height, width = _window_shape(x, self.kernel.shape[:2], self)
        return TensorType((height, width, self.kernel.shape[3]))


@operation
class MaxPool(Operation):
    """The maximum of windows of images; padding never wins.

    Attributes:
      window: one number, or one for each direction.
      strides: one number, or one for each direction.
      padding: as in `Conv`.

    Raises:
      ValueError: a number is out of range, or an argument of another form.
      TypeError: a number is not an integer.

    Example:
      >>> from cram_jax.engine import MaxPool, TensorType
      >>> MaxPool(2, strides=2).infer(TensorType((32, 32, 16)))
      TensorType(shape=(16, 16, 16), dtype='float32')
    """

    window: int | tuple[int, int]
    strides: int | tuple[int, int] = 1
    padding: Padding = "VALID"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", as_pair("window", self.window))
        object.__setattr__(self, "strides", as_pair("strides", self.strides))
        object.__setattr__(self, "padding", as_pads(self.padding))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1, rank=3)
        window = as_pair("window", self.window)
        height, width = _window_shape(x, window, self)
        return TensorType((height, width, x.features))


@operation
class AvgPool(MaxPool):
    """The mean of windows of images; padding counts as zeros.

    Attributes:
      window: one number, or one for each direction.
      strides: one number, or one for each direction.
      padding: as in `Conv`.

    Raises:
      ValueError: as for `MaxPool`.
      TypeError: as for `MaxPool`.
    """


@operation
class Mean(Operation):
    """The mean of an image over its positions: (channels,)."""

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1, rank=3)
        return TensorType((x.features,))


@operation
class Flatten(Operation):
    """An image as features, in the order of height, width and channels."""

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1, rank=3)
        return TensorType((int(np.prod([size or 0 for size in x.shape])),))


@operation
class SpaceToDepth(Operation):
    """Squares of an input image as channels, in the order of row, column, channel.

    Attributes:
      size: side of the squares; it divides both sides of the image.

    Raises:
      ValueError: ``size`` is below 1.
      TypeError: ``size`` is not an integer.

    Example:
      >>> from cram_jax.engine import SpaceToDepth, TensorType
      >>> SpaceToDepth(4).infer(TensorType((32, 32, 3)))
      TensorType(shape=(8, 8, 48), dtype='float32')
    """

    size: int

    def __post_init__(self) -> None:
        check_integer("size", self.size, minimum=1)
        object.__setattr__(self, "size", int(self.size))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1, rank=3)
        height, width, channels = (size or 0 for size in x.shape)
        expect(
            height % self.size == 0 == width % self.size,
            f"size={self.size} does not divide {height} x {width}",
        )
        return TensorType(
            (height // self.size, width // self.size, self.size**2 * channels)
        )


def window_pads(operation: Any, x: TensorType) -> Pads:
    """The padding of a convolution or pool in numbers."""
    window = (
        operation.kernel.shape[:2] if hasattr(operation, "kernel") else operation.window
    )
    height, width = (size or 0 for size in x.shape[:2])
    return resolve_pads(operation.padding, (height, width), window, operation.strides)


def _window_shape(
    x: TensorType, window: tuple[int, ...], operation: Any
) -> tuple[int, int]:
    pads = window_pads(operation, x)
    strides = operation.strides
    return check_window(x, window, strides, pads)


def check_window(
    x: TensorType, window: Sequence[int], strides: Sequence[int], pads: Pads
) -> tuple[int, int]:
    """Height and width of what windows of an image give.

    Raises:
      ValueError: the window is larger than the padded image, or not larger than the
        padding, or has too many positions.
    """
    expect(
        window[0] * window[1] <= _LARGEST_WINDOW,
        f"the window {tuple(window)} must have at most {_LARGEST_WINDOW} positions",
    )
    for size, low_high in zip(window, pads, strict=True):
        expect(max(low_high) < size, f"padding {pads} reaches the window {window}")
    height, width = (
        conv_size(size or 0, low_high, side, stride)
        for size, low_high, side, stride in zip(
            x.shape[:2], pads, window, strides, strict=True
        )
    )
    expect(height > 0 and width > 0, f"the window {window} does not fit into {x.shape}")
    return height, width
