"""PRNG keys as users give them, and as states hold them.

A state holds the key's data, a plain uint32 array: `flax.serialization`,
`equinox.tree_serialise_leaves` and `numpy.save` cannot write typed keys.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_key(key: Any) -> None:
    """Raises a TypeError unless the value is a PRNG key or a seed."""
    is_number = isinstance(key, int | np.integer | np.ndarray | jax.Array)
    dtype = jnp.result_type(key) if is_number else None
    if dtype is not None and jnp.ndim(key) == 0:
        if _is_typed(dtype) or jnp.issubdtype(dtype, jnp.integer):
            return
    elif dtype == jnp.uint32 and jnp.shape(key) == _legacy_shape():
        return
    raise TypeError(
        f"key must be a PRNG key or an integer seed, got {key!r}"
        + (f" of shape {jnp.shape(key)}: take one of the keys" if dtype else "")
    )


def as_key(key: int | jax.Array) -> jax.Array:
    """The typed key for a seed, a legacy uint32 key or a typed key."""
    check_key(key)
    if _is_typed(jnp.result_type(key)):
        return key  # type: ignore[return-value]
    if jnp.ndim(key) == 1:
        return jax.random.wrap_key_data(jnp.asarray(key))
    return jax.random.key(key)


def key_data(key: int | jax.Array) -> jax.Array:
    """The uint32 data of a key or seed, for a state."""
    # A copy, because a training step may donate its state.
    return jnp.array(jax.random.key_data(as_key(key)))


def split_key_data(data: jax.Array, key: int | jax.Array) -> tuple[jax.Array, ...]:
    """Splits a key of a state in two.

    Args:
      data: from the state.
      key: the initial key, for its generator.

    Returns:
      The data of the next key, and a typed key to draw with.
    """
    is_typed = _is_typed(jnp.result_type(key))
    impl = jax.random.key_impl(key) if is_typed else None
    following, draw = jax.random.split(jax.random.wrap_key_data(data, impl=impl))
    return jax.random.key_data(following), draw


def _is_typed(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _legacy_shape() -> tuple[int, ...]:
    return jax.eval_shape(jax.random.PRNGKey, 0).shape
