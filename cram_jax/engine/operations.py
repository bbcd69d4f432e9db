"""The operations of a graph: frozen dataclasses of weights and options."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, TypeVar, dataclass_transform

import numpy as np

from cram_jax.engine.arrays import (
    Pads,
    as_float32,
    as_pads,
    as_pair,
    conv_size,
    resolve_pads,
)
from cram_jax.validation import check_integer

Padding: TypeAlias = int | Literal["SAME", "VALID"] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class TensorType:
    """What flows along an edge, without its batch axis.

    Attributes:
      shape: (features,), (length, features) or (height, width, channels); of integers
        (length,). A length of None may differ from call to call.
      dtype: "float32" or "int32".
    """

    shape: tuple[int | None, ...]
    dtype: Literal["float32", "int32"] = "float32"

    @property
    def features(self) -> int:
        """The size of the last axis."""
        size = self.shape[-1]
        assert size is not None
        return size


Kind = TypeVar("Kind")


class Operation:
    """One operation: a frozen dataclass of its weights and options."""

    def infer(self, *inputs: TensorType) -> TensorType:
        """The type of the result.

        Raises:
          ValueError: the inputs do not suit the operation.
        """
        raise NotImplementedError


@dataclass_transform(frozen_default=True, eq_default=False)
def operation(cls: type[Kind]) -> type[Kind]:
    """Makes an operation of a class: frozen, compared by identity, as arrays are."""
    return dataclass(frozen=True, eq=False)(cls)


@operation
class Input(Operation):
    """What the caller passes, in the order in which inputs were added.

    Attributes:
      shape: without the batch axis; see `TensorType`.
      dtype: "float32", or "int32" for tokens, segments and masks.
    """

    shape: tuple[int | None, ...]
    dtype: Literal["float32", "int32"] = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "int32"):
            raise ValueError(f"dtype must be 'float32' or 'int32', got {self.dtype!r}")
        ranks = (1,) if self.dtype == "int32" else (1, 2, 3)
        if len(self.shape) not in ranks:
            raise ValueError(
                f"shape of a {self.dtype} input must have rank "
                f"{' or '.join(map(str, ranks))}, got {self.shape}"
            )
        for axis, size in enumerate(self.shape):
            is_length = axis == 0 and (self.dtype == "int32" or len(self.shape) == 2)
            if size is None and is_length:
                continue
            check_integer(f"shape[{axis}]", size, minimum=1, maximum=2**24)

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        expect(len(inputs) == 0, "an input has no inputs")
        return TensorType(tuple(self.shape), self.dtype)


@operation
class Linear(Operation):
    """``x @ kernel + bias`` along the last axis.

    Attributes:
      kernel: (inputs, outputs).
      bias: (outputs,), or None.
    """

    kernel: np.ndarray
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        _set_array(self, "kernel", (None, None))
        _set_array(self, "bias", (self.kernel.shape[1],))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = _floats(inputs, 1)
        _expect_features(x, self.kernel.shape[0], "kernel's inputs")
        return TensorType((*x.shape[:-1], self.kernel.shape[1]))


@operation
class Conv(Operation):
    """A convolution of images (height, width, channels), as in Flax.

    Attributes:
      kernel: (height, width, inputs, outputs).
      bias: (outputs,), or None.
      strides: one number, or one for each direction.
      padding: a number, "SAME", "VALID" or ((top, bottom), (left, right)).
    """

    kernel: np.ndarray
    bias: np.ndarray | None = None
    strides: int | tuple[int, int] = 1
    padding: Padding = "SAME"

    def __post_init__(self) -> None:
        _set_array(self, "kernel", (None,) * 4)
        _set_array(self, "bias", (self.kernel.shape[3],))
        object.__setattr__(self, "strides", as_pair("strides", self.strides))
        object.__setattr__(self, "padding", as_pads(self.padding))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = _floats(inputs, 1, rank=3)
        _expect_features(x, self.kernel.shape[2], "kernel's inputs")
        height, width = _window_shape(x, self.kernel.shape[:2], self)
        return TensorType((height, width, self.kernel.shape[3]))


@operation
class Affine(Operation):
    """``x * scale + offset`` along the last axis: batch norm in evaluation.

    Attributes:
      scale: (features,).
      offset: (features,).
    """

    scale: np.ndarray
    offset: np.ndarray

    def __post_init__(self) -> None:
        _set_array(self, "scale", (None,))
        _set_array(self, "offset", self.scale.shape)

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = _floats(inputs, 1)
        _expect_features(x, len(self.scale), "scale")
        return x


def batch_norm(
    mean: np.ndarray,
    variance: np.ndarray,
    scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    epsilon: float = 1e-5,
) -> Affine:
    """Batch norm in evaluation, from its statistics.

    Args:
      mean: (features,), the running mean.
      variance: (features,), the running variance.
      scale: (features,), or None for 1.
      bias: (features,), or None for 0.
      epsilon: added to the variance.

    Returns:
      The operation.
    """
    multiplier = np.asarray(1 if scale is None else scale, np.float64)
    multiplier = multiplier / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    offset = (0 if bias is None else bias) - np.asarray(mean, np.float64) * multiplier
    return Affine(multiplier, offset)


class _Pointwise(Operation):
    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = _floats(inputs, 1)
        return x


@operation
class Relu(_Pointwise):
    """``max(x, 0)``."""


@operation
class Gelu(_Pointwise):
    """The exact GELU, ``x * Phi(x)``."""


@operation
class Tanh(_Pointwise):
    """The hyperbolic tangent."""


@operation
class Softmax(_Pointwise):
    """Softmax along the last axis."""


@operation
class Add(Operation):
    """``x + y`` of equal shapes."""

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        x, y = _floats(inputs, 2)
        expect(x.shape == y.shape, f"shapes differ: {x.shape} and {y.shape}")
        return x


@operation
class LayerNorm(Operation):
    """Layer norm along the last axis.

    Attributes:
      scale: (features,).
      bias: (features,).
      epsilon: added to the variance.
    """

    scale: np.ndarray
    bias: np.ndarray
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _set_array(self, "scale", (None,))
        _set_array(self, "bias", self.scale.shape)
        expect(0 < self.epsilon < 1, f"epsilon must be in (0, 1), got {self.epsilon!r}")

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = _floats(inputs, 1)
        expect(len(x.shape) < 3, f"needs rank 1 or 2, got shape {x.shape}")
        _expect_features(x, len(self.scale), "scale")
        return x


@operation
class Embedding(Operation):
    """Rows of a table by integers (length,): features (length, features).

    Attributes:
      table: (entries, features).
    """

    table: np.ndarray

    def __post_init__(self) -> None:
        _set_array(self, "table", (None, None))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        expect(len(inputs) == 1, f"needs 1 input, got {len(inputs)}")
        (ids,) = inputs
        expect(ids.dtype == "int32", f"needs integers, got {ids}")
        return TensorType((ids.shape[0], self.table.shape[1]))


@operation
class AddPositions(Operation):
    """Adds the first rows of a table to features (length, features).

    Attributes:
      table: (longest length, features).
    """

    table: np.ndarray

    def __post_init__(self) -> None:
        _set_array(self, "table", (None, None))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = _floats(inputs, 1, rank=2)
        _expect_features(x, self.table.shape[1], "table")
        length = x.shape[0] or 1
        expect(
            length <= len(self.table),
            f"length {length} is above the table's {len(self.table)} rows",
        )
        return x


@operation
class Attention(Operation):
    """Scaled dot-product attention of several heads over (length, heads * depth).

    Its inputs are query, key, value and, if tokens may be padding, a mask (length,) of
    integers that is zero for padding. A mask of zeros attends evenly to everything.

    Attributes:
      heads: how many; they share the features evenly.
    """

    heads: int

    def __post_init__(self) -> None:
        check_integer("heads", self.heads, minimum=1)

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        expect(len(inputs) in (3, 4), f"needs 3 or 4 inputs, got {len(inputs)}")
        query, key, value = _floats(inputs[:3], 3, rank=2)
        expect(
            query.shape == key.shape == value.shape,
            f"shapes differ: {query.shape}, {key.shape}, {value.shape}",
        )
        expect(
            query.features % self.heads == 0,
            f"heads={self.heads} does not divide {query.features} features",
        )
        for mask in inputs[3:]:
            same = mask.dtype == "int32" and mask.shape[0] == query.shape[0]
            expect(same, f"the mask must be integers of the same length, got {mask}")
        return query


@operation
class MaxPool(Operation):
    """The maximum of windows of images; padding never wins.

    Attributes:
      window: one number, or one for each direction.
      strides: one number, or one for each direction.
      padding: as in `Conv`.
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
        (x,) = _floats(inputs, 1, rank=3)
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
    """


@operation
class Mean(Operation):
    """The mean of an image over its positions: (channels,)."""

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = _floats(inputs, 1, rank=3)
        return TensorType((x.features,))


@operation
class Flatten(Operation):
    """An image as features, in the order of height, width and channels."""

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = _floats(inputs, 1, rank=3)
        return TensorType((int(np.prod([size or 0 for size in x.shape])),))


@operation
class SpaceToDepth(Operation):
    """Squares of an input image as channels, in the order of row, column, channel.

    Attributes:
      size: side of the squares; it divides both sides of the image.
    """

    size: int

    def __post_init__(self) -> None:
        check_integer("size", self.size, minimum=1)

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = _floats(inputs, 1, rank=3)
        height, width, channels = (size or 0 for size in x.shape)
        expect(
            height % self.size == 0 == width % self.size,
            f"size={self.size} does not divide {height} x {width}",
        )
        return TensorType(
            (height // self.size, width // self.size, self.size**2 * channels)
        )


@operation
class Token(Operation):
    """One token of a sequence (length, features): (features,).

    Attributes:
      index: its position.
    """

    index: int = 0

    def __post_init__(self) -> None:
        check_integer("index", self.index, minimum=0)

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = _floats(inputs, 1, rank=2)
        return TensorType((x.features,))


def window_pads(operation: Any, x: TensorType) -> Pads:
    """The padding of a convolution or pool in numbers."""
    window = (
        operation.kernel.shape[:2] if hasattr(operation, "kernel") else operation.window
    )
    height, width = (size or 0 for size in x.shape[:2])
    return resolve_pads(operation.padding, (height, width), window, operation.strides)


def weights(operation: Operation) -> dict[str, np.ndarray]:
    """The arrays of an operation, by the names of its fields."""
    named = ((f.name, getattr(operation, f.name)) for f in fields(operation))  # type: ignore[arg-type]
    return {name: value for name, value in named if isinstance(value, np.ndarray)}


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
        padding.
    """
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


def _set_array(operation: Operation, name: str, shape: tuple[int | None, ...]) -> None:
    value = getattr(operation, name)
    if value is not None:
        object.__setattr__(operation, name, as_float32(name, value, shape))


def _floats(
    inputs: Sequence[TensorType], count: int, rank: int | None = None
) -> Sequence[TensorType]:
    expect(len(inputs) == count, f"needs {count} inputs, got {len(inputs)}")
    for x in inputs:
        expect(x.dtype == "float32", f"needs float32 inputs, got {x}")
        if rank is not None:
            expect(len(x.shape) == rank, f"needs rank {rank}, got shape {x.shape}")
    return inputs


def _expect_features(x: TensorType, size: int, what: str) -> None:
    expect(
        x.features == size, f"{what} of {size} does not fit inputs of shape {x.shape}"
    )


def expect(condition: bool, message: str) -> None:
    """Raises a ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
