"""Numbers rounded to narrow floating-point formats, but kept in a wider dtype.

A round trip through the narrow dtype would not do: under `jax.jit`, XLA may drop it.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

Scale: TypeAlias = Literal["float32", "float16", "bfloat16"]


def round_scale(scale: jax.Array, kind: Scale) -> jax.Array:
    """Positive scales as a format stores them, within its finite range."""
    return _ROUNDINGS[kind](scale)


def round_e4m3(x: jax.Array) -> jax.Array:
    """The nearest 8-bit number with a 4-bit exponent (OCP E4M3), at most 448."""
    return _rounded(x, mantissa=3, smallest=2.0**-6, largest=448.0)


def round_e2m1(x: jax.Array) -> jax.Array:
    """The nearest 4-bit number: 0, 0.5, 1, 1.5, 2, 3, 4, 6 or minus one of those.

    Half to even, at most 6 (OCP E2M1).
    """
    return _rounded(x, mantissa=1, smallest=1.0, largest=6.0)


def _rounded(x: jax.Array, mantissa: int, smallest: float, largest: float) -> jax.Array:
    """Rounds to a mantissa of that many bits; in even steps below ``smallest``."""
    step = smallest * 2.0**-mantissa
    small = jnp.round(x / step) * step
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=mantissa)
    rounded = jnp.where(jnp.abs(x) < smallest, small, normal)
    return jnp.clip(rounded, -largest, largest)


_ROUNDINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "float32": lambda x: x,  # float64 leaves keep float64
    "float16": lambda x: _rounded(x, 10, smallest=2.0**-14, largest=65504.0),
    "bfloat16": lambda x: jax.lax.reduce_precision(x, 8, 7),
}
