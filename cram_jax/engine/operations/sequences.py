"""Operations of sequences (length, features)."""

import numpy as np

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


@operation
class Embedding(Operation):
    """Rows of a table by integers (length,): features (length, features).

    Attributes:
      table: (entries, features).

    Raises:
      ValueError: the table has another shape, or an entry that is not finite.
      TypeError: the table is not of numbers.

    Example:
      >>> import numpy as np
      >>> from cram_jax.engine import Embedding, TensorType
      >>> Embedding(np.ones((1000, 64))).infer(TensorType((None,), "int32"))
      TensorType(shape=(None, 64), dtype='float32')
    """

    table: np.ndarray

    def __post_init__(self) -> None:
        set_array(self, "table", (None, None))

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

    Raises:
      ValueError: the table has another shape, or an entry that is not finite.
      TypeError: the table is not of numbers.
    """

    table: np.ndarray

    def __post_init__(self) -> None:
        set_array(self, "table", (None, None))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1, rank=2)
        expect_features(x, self.table.shape[1], "table")
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

    Raises:
      ValueError: ``heads`` is below 1.
      TypeError: ``heads`` is not an integer.

    Example:
      >>> from cram_jax.engine import Attention, TensorType
      >>> query = key = value = TensorType((None, 64))
      >>> Attention(heads=4).infer(query, key, value, TensorType((None,), "int32"))
      TensorType(shape=(None, 64), dtype='float32')
    """

    heads: int

    def __post_init__(self) -> None:
        check_integer("heads", self.heads, minimum=1)
        object.__setattr__(self, "heads", int(self.heads))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        expect(len(inputs) in (3, 4), f"needs 3 or 4 inputs, got {len(inputs)}")
        query, key, value = floats(inputs[:3], 3, rank=2)
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
class Token(Operation):
    """One token of a sequence (length, features): (features,).

    Attributes:
      index: its position.

    Raises:
      ValueError: ``index`` is negative.
      TypeError: ``index`` is not an integer.
    """

    index: int = 0

    def __post_init__(self) -> None:
        check_integer("index", self.index, minimum=0)
        object.__setattr__(self, "index", int(self.index))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1, rank=2)
        return TensorType((x.features,))
