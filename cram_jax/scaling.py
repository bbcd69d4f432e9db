"""What magnitudes are multiplied by before they are compared, or squared."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.paths import ByPath, by_path
from cram_jax.projector import widened
from cram_jax.selection import magnitude_key

Scale: TypeAlias = Callable[[str, jax.Array], float] | Any
"""``(path, leaf) -> number``, or a pytree of numbers, such as a dict by path."""


def scale_value(scale: Scale | None) -> Any:
    """The multipliers of leaves, as a value that compares and hashes.

    Raises:
      TypeError: it is neither a function nor a tree of numbers, or a number is traced.
      ValueError: a number is not positive and finite.
    """
    kinds = (float, int, np.floating, np.integer, np.ndarray, jax.Array)
    value = by_path("scale", scale, kinds, "positive numbers")
    if not isinstance(value, ByPath):
        return value
    return ByPath(tuple((p, _checked(p, number)) for p, number in value.entries))


def scale_of(scale: Any, path: str, leaf: Any) -> float:
    """The multiplier of a leaf.

    Args:
      scale: from `scale_value`, not None.
      path: of the leaf.
      leaf: the leaf.

    Raises:
      ValueError: the leaf has none, or a function gives one that is not positive.
    """
    if not isinstance(scale, ByPath):
        with jax.ensure_compile_time_eval():
            number = scale(path, leaf)
        return _checked(path, number)
    numbers = dict(scale.entries)
    if path not in numbers:
        raise ValueError(
            f"scale must name every leaf that is pruned, among them {path!r}, got "
            f"{sorted(numbers)}"
        )
    return numbers[path]


def scaled(score: jax.Array, factor: float) -> jax.Array:
    """The scores times the multiplier, in float32 at least."""
    return widened(score) * factor


def power_of_two(largest: jax.Array) -> jax.Array:
    """The next one down, if both it and its inverse are normal numbers.

    Divided by it, numbers have all their digits, and squares that stay in range.
    """
    exponent = magnitude_key(jnp.full([], jnp.inf, largest.dtype))
    down = magnitude_key(largest) & exponent
    smallest = jnp.finfo(largest.dtype).smallest_normal
    power = jax.lax.bitcast_convert_type(down, largest.dtype)
    return jnp.clip(power, smallest, 1 / smallest)


def _checked(path: str, number: Any) -> float:
    if isinstance(number, jax.core.Tracer):
        raise TypeError(
            f"scale must not read the weights, which are traced, but depends on those "
            f"of {path!r}; compute a tree of numbers from them first, outside jit"
        )
    kinds = float | int | np.number | np.ndarray | jax.Array
    is_number = isinstance(number, kinds) and not isinstance(number, bool)
    if not is_number or np.ndim(number) or not 0 < float(number) < math.inf:
        raise ValueError(
            f"scale must be positive and finite, got {number!r} for {path!r}"
        )
    return float(number)
