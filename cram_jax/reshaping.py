"""Reshapes that state the sharding of the result, as explicit mesh axes require."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def split_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Cuts an axis into groups: (..., n, ...) to (..., n // size, size, ...).

    Args:
      array: any array.
      axis: at least 0.
      size: of a group; it divides the axis.

    Returns:
      The array. Unless groups straddle shards, nothing is exchanged.
    """
    shape = array.shape
    groups = shape[axis] // size
    sharding = explicit_sharding(array)
    if sharding is not None:
        entries = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
        if groups % shards(sharding, entries[axis]):
            entries[axis] = None
        entries.insert(axis + 1, None)
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*entries))
    split = (*shape[:axis], groups, size, *shape[axis + 1 :])
    return jax.lax.reshape(array, split, out_sharding=sharding)


def join_axes(array: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `split_axis`: the shape and sharding of ``like``."""
    return jax.lax.reshape(array, like.shape, out_sharding=explicit_sharding(like))


def pad_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Pads an axis with zeros to a multiple of a size.

    Shards of explicit mesh axes would be uneven: then the axis is gathered first.
    """
    missing = -array.shape[axis] % size
    if not missing:
        return array
    width = [(0, missing if other == axis else 0) for other in range(array.ndim)]
    return jnp.pad(gathered_axis(array, axis), width)


def crop(array: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `pad_axis`: the shape and sharding of ``like``."""
    if array.shape == like.shape:
        return array
    return placed(array[tuple(slice(size) for size in like.shape)], like)


def gathered_axis(array: jax.Array, axis: int) -> jax.Array:
    """An axis whole on every device, if its mesh axes are explicit."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return array
    entries = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    entries[axis] = None
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*entries))
    return jax.sharding.reshard(array, sharding)


def gathered(array: jax.Array) -> jax.Array:
    """The whole array on every device, if its mesh axes are explicit."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def placed(array: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `gathered`: the sharding of ``like``, which has the same shape."""
    sharding = explicit_sharding(like)
    return array if sharding is None else jax.sharding.reshard(array, sharding)


def explicit_sharding(array: jax.Array) -> NamedSharding | None:
    """How an array lies on a mesh, if its type says so."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def shards(sharding: NamedSharding, entry: str | tuple[str, ...] | None) -> int:
    """Into how many parts an entry of a partition specification cuts an axis."""
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    return math.prod(sharding.mesh.shape[name] for name in names)
