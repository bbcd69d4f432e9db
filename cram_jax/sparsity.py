"""A sparsity as a number: read exactly, traced, or drawn; and how many weights stay."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.validation import holds

Number: TypeAlias = float | np.floating | np.ndarray | jax.Array


@dataclass(frozen=True, eq=False)
class Traced:
    """A traced sparsity, which has no value to compare: it equals only itself."""

    value: jax.Array

    def __repr__(self) -> str:
        return "traced"


@dataclass(frozen=True, eq=False)
class Drawn:
    """The sparsity at a traced index."""

    sparsities: tuple[float, ...]
    index: jax.Array


def sparsity_value(sparsity: Number) -> Any:
    """The decimal that a sparsity prints as."""
    if isinstance(sparsity, jax.core.Tracer):
        return Traced(sparsity)
    if isinstance(sparsity, float | int) and not isinstance(sparsity, np.floating):
        return sparsity
    return float(str(np.asarray(sparsity)[()]))


def sparsity_now(sparsity: Any) -> float | jax.Array:
    """The sparsity as a number, or as an array if it is traced."""
    if isinstance(sparsity, Drawn):
        return jnp.asarray(sparsity.sparsities)[sparsity.index]
    return sparsity.value if isinstance(sparsity, Traced) else sparsity


def kept_count(size: int, sparsity: Any) -> int | jax.Array:
    """How many of ``size`` weights stay: ``size - floor(sparsity * size)``, exactly.

    Args:
      size: the number of weights.
      sparsity: as in `top_k`.

    Returns:
      An int, or an integer scalar if the sparsity is traced. That of a projector that
      is traced keeps at least one weight.

    Raises:
      ValueError: it is traced, there are 2**31 weights or more, and 64-bit integers
        are disabled.

    Example:
      >>> kept_count(100, 0.29), kept_count(3, 1 - 1 / 3)
      (71, 1)
    """
    if not isinstance(size, int):
        raise ValueError(
            f"a sparsity is of a number of weights: the shapes of what is pruned must "
            f"be known, got {size} weights"
        )
    if isinstance(sparsity, Drawn):
        counts = [kept_count(size, share) for share in sparsity.sparsities]
        return jnp.asarray(counts)[sparsity.index]
    if isinstance(sparsity, Traced):
        # It could not be refused if it is 1.
        return jnp.maximum(kept_count(size, sparsity.value), min(size, 1))
    if not isinstance(sparsity, jax.core.Tracer):
        exact = Fraction(str(np.asarray(sparsity)[()])) * size
        nearest = round(exact)
        # A share computed as count / size is off by a rounding error of float64.
        rounding = Fraction(size, 2**52)
        is_integer = nearest < size and abs(exact - nearest) <= rounding
        return size - (nearest if is_integer else int(exact))
    if size >= 2**31 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"a traced sparsity of {size} weights needs 64-bit integers: "
            f"jax.config.update('jax_enable_x64', True)"
        )
    if sparsity.dtype == jnp.float64:
        removed = jnp.floor(sparsity * size + size * 2.0**-52).astype(int)
    else:
        # float32 holds neither a large count nor 0.9, so multiply integers: first to
        # the nearest of ten million shares, then, digit by digit, to the count.
        integer = jnp.int32 if size < 2**31 else jnp.int64
        binary = (sparsity.astype(jnp.float32) * 2**30).astype(integer)
        decimal = (_floor_product(binary, 2**10, 3, 2 * 10**7) + 1) // 2
        removed = _floor_product(decimal, 10, 7, size)
    return size - jnp.clip(removed, 0, size)


def _floor_product(
    numerator: jax.Array, base: int, digits: int, size: int
) -> jax.Array:
    """``floor(size * numerator / base**digits)`` without a product above ``size``."""
    total = jnp.zeros_like(numerator)
    for _ in range(digits):
        numerator, digit = numerator // base, numerator % base
        total = digit * (size // base) + (digit * (size % base) + total) // base
    return total + numerator * size


def check_sparsity(sparsity: Number) -> None:
    """Raises unless 0 <= sparsity < 1; a traced one is trusted."""
    is_number = isinstance(sparsity, float | int | np.number | np.ndarray | jax.Array)
    if is_number and not np.ndim(sparsity) and isinstance(sparsity, jax.core.Tracer):
        return
    if not is_number or np.ndim(sparsity):
        raise TypeError(
            f"sparsity must be a number with 0 <= sparsity < 1, got {sparsity!r}"
        )
    if not holds(lambda: 0 <= sparsity < 1):
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity!r}")
