"""Checksums of arrays, the same however they are sharded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

CHUNK = 2**20  # numbers whose checksum is computed at a time


def checksums(tree: Any) -> np.ndarray:
    """A checksum of every leaf, uint32 (leaves, 2), however it is sharded.

    It is the sum, modulo 2^64, of the bits of every number times an odd factor of its
    own, so that a change of one number always shows.
    """
    sums = np.array([_checksum(leaf) for leaf in jax.tree.leaves(tree)], np.uint64)
    if jax.process_count() > 1 and len(sums):
        # In four parts of 16 bits: processes exchange 32 bits, and the sums are exact.
        shifts = np.arange(4, dtype=np.uint64) * np.uint64(16)
        parts = (sums[:, None] >> shifts) & np.uint64(0xFFFF)
        gathered = multihost_utils.process_allgather(parts.astype(np.uint32))
        total = np.asarray(gathered).astype(np.uint64).sum(axis=0)
        sums = (total << shifts).sum(axis=1, dtype=np.uint64)
    halves = sums[:, None] >> np.array([0, 32], np.uint64)
    return (halves & np.uint64(0xFFFFFFFF)).astype(np.uint32).reshape(-1, 2)


def abstract_checksums(tree: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the checksums of a tree."""
    return jax.ShapeDtypeStruct((len(jax.tree.leaves(tree)), 2), np.uint32)


def _checksum(leaf: Any) -> int:
    """The checksum of the part of a leaf that this process counts."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array):
        if jax.process_index() != 0:
            return 0
        array = np.asarray(leaf)
        return _sum_bits(array, np.arange(array.size, dtype=np.uint64))
    total = 0
    for shard in leaf.addressable_shards:
        if shard.replica_id != 0:
            continue
        places = np.arange(leaf.size, dtype=np.uint64).reshape(leaf.shape)[shard.index]
        total += _sum_bits(np.asarray(shard.data), places.reshape(-1))
    return total % 2**64


def _sum_bits(array: np.ndarray, places: np.ndarray) -> int:
    words = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    bits = np.ascontiguousarray(array).reshape(-1).view(words[array.dtype.itemsize])
    total = 0
    for begin in range(0, len(bits), CHUNK):
        chunk = slice(begin, begin + CHUNK)
        factors = places[chunk] * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
        values = bits[chunk].astype(np.uint64)
        total += int((values * factors).sum(dtype=np.uint64))
    return total % 2**64
