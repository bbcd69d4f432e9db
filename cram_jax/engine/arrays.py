"""Checks of the arrays and paddings of a graph's operations."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from cram_jax.validation import check_integer

Pads: TypeAlias = tuple[tuple[int, int], tuple[int, int]]


def as_float32(name: str, value: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """A contiguous float32 array of a shape; None fits any size of at least one.

    Raises:
      ValueError: the shape is another, or an entry is not finite.
      TypeError: the entries are not numbers.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" and str(array.dtype) != "bfloat16":
        raise TypeError(f"{name} must be an array of numbers, got {array.dtype}")
    fits = len(array.shape) == len(shape) and all(
        size > 0 and wanted in (None, size)
        for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        expected = tuple("any" if size is None else size for size in shape)
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite in float32")
    return array


def as_pair(name: str, value: Any) -> tuple[int, int]:
    """One number for both directions, or one for each; all at least 1."""
    pair = tuple(value) if isinstance(value, Iterable) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number or two numbers, got {value!r}")
    for number in pair:
        check_integer(name, number, minimum=1, maximum=2**12)
    return int(pair[0]), int(pair[1])


def as_pads(value: Any) -> Pads | Literal["SAME", "VALID"]:
    """Padding in the form ((top, bottom), (left, right)), or its name."""
    if isinstance(value, str):
        if value not in ("SAME", "VALID"):
            raise ValueError(f"padding must be 'SAME' or 'VALID', got {value!r}")
        return value  # type: ignore[return-value]
    if isinstance(value, int | np.integer):
        value = ((value, value),) * 2
    if np.shape(value) != (2, 2):
        raise ValueError(
            f"padding must be a number, ((top, bottom), (left, right)), 'SAME' or "
            f"'VALID', got {value!r}"
        )
    for pair in value:
        for number in pair:
            check_integer("padding", number, minimum=0, maximum=2**12)
    return tuple(tuple(int(number) for number in pair) for pair in value)  # type: ignore[return-value]


def resolve_pads(
    padding: Pads | Literal["SAME", "VALID"],
    size: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
) -> Pads:
    """Padding in numbers; "SAME" puts the odd one at the end, as XLA does."""
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(size, window, strides, padding)
        rows, columns = ((int(low), int(high)) for low, high in pads)
        return rows, columns
    return padding


def conv_size(size: int, pads: tuple[int, int], window: int, stride: int) -> int:
    """Positions of a window along one axis."""
    return (size + sum(pads) - window) // stride + 1
