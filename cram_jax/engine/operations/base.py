"""The base of all operations, and the checks that they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, dataclass_transform

from cram_jax.engine.arrays import as_float32
from cram_jax.validation import check_integer


@dataclass(frozen=True)
class TensorType:
    """The type of a tensor in a graph, without its batch axis.

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

    @property
    def has_length(self) -> bool:
        """Whether the first axis is the length of a sequence."""
        return self.dtype == "int32" or len(self.shape) == 2


Kind = TypeVar("Kind")


class Operation:
    """One operation: a frozen dataclass of its weights and options."""

    def infer(self, *inputs: TensorType) -> TensorType:
        """The type of the result.

        Args:
          *inputs: the types of the nodes that it reads.

        Returns:
          The type.

        Raises:
          ValueError: the inputs do not suit the operation.

        Example:
          >>> import numpy as np
          >>> from cram_jax.engine import Linear, TensorType
          >>> Linear(np.ones((3, 8))).infer(TensorType((16, 3)))
          TensorType(shape=(16, 8), dtype='float32')
        """
        raise NotImplementedError


@dataclass_transform(frozen_default=True, eq_default=False)
def operation(cls: type[Kind]) -> type[Kind]:
    """Makes an operation from a class: frozen, and compared by identity."""
    return dataclass(frozen=True, eq=False)(cls)


@operation
class Input(Operation):
    """An input that the caller passes, in the order in which inputs were added.

    Attributes:
      shape: without the batch axis; see `TensorType`.
      dtype: "float32", or "int32" for tokens, segments and masks.

    Raises:
      ValueError: the dtype is another, or the shape is not one of such a tensor.
      TypeError: a size is not an integer.

    Example:
      >>> from cram_jax.engine import Input
      >>> images, tokens = Input((32, 32, 3)), Input((None,), "int32")
    """

    shape: tuple[int | None, ...]
    dtype: Literal["float32", "int32"] = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "int32"):
            raise ValueError(f"dtype must be 'float32' or 'int32', got {self.dtype!r}")
        if not isinstance(self.shape, tuple | list):
            raise TypeError(f"shape must be a tuple of sizes, got {self.shape!r}")
        ranks = (1,) if self.dtype == "int32" else (1, 2, 3)
        if len(self.shape) not in ranks:
            raise ValueError(
                f"shape of a {self.dtype} input must have rank "
                f"{' or '.join(map(str, ranks))}, got {self.shape}"
            )
        for axis, size in enumerate(self.shape):
            if size is None and axis == 0 and self.infer().has_length:
                continue
            check_integer(f"shape[{axis}]", size, minimum=1, maximum=2**24)
        sizes = tuple(None if size is None else int(size) for size in self.shape)
        object.__setattr__(self, "shape", sizes)

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        expect(len(inputs) == 0, "an input has no inputs")
        return TensorType(tuple(self.shape), self.dtype)


def set_array(
    operation: Operation,
    name: str,
    shape: tuple[int | None, ...],
    *,
    optional: bool = False,
) -> None:
    """Makes a field of an operation a float32 array of a shape; None if optional."""
    value = getattr(operation, name)
    if value is not None or not optional:
        object.__setattr__(operation, name, as_float32(name, value, shape))


def floats(
    inputs: Sequence[TensorType], count: int, rank: int | None = None
) -> Sequence[TensorType]:
    """The inputs, checked to be so many of float32 and, if given, of one rank."""
    expect(len(inputs) == count, f"needs {count} inputs, got {len(inputs)}")
    for x in inputs:
        expect(x.dtype == "float32", f"needs float32 inputs, got {x}")
        if rank is not None:
            expect(len(x.shape) == rank, f"needs rank {rank}, got shape {x.shape}")
    return inputs


def expect_features(x: TensorType, size: int, what: str, hint: str = "") -> None:
    """Raises a ValueError unless the last axis has this size."""
    expect(
        x.features == size,
        f"{what} of {size} does not fit inputs of shape {x.shape}{hint}",
    )


def expect(condition: bool, message: str) -> None:
    """Raises a ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
