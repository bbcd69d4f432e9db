"""How many entries of sharded arrays are true, with one exchange for all of them."""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

Sets: TypeAlias = Sequence[Sequence[jax.Array]]
"""Bool arrays, as ``sets[which][array]``; the arrays of every set are alike."""


def count_true(sets: Sets, dtype: jnp.dtype) -> jax.Array:
    """Counts the true entries of several sets of arrays, of each set over its arrays.

    Args:
      sets: at most eight, of one bool array or more; those at one place in their sets
        have one shape and sharding.
      dtype: of the counts, an integer that can hold them.

    Returns:
      One count a set, shape (sets,). Where the arrays are sharded, each device counts
      what it holds, and one all-reduce of the counts is all that is exchanged. Inside
      `jax.shard_map` it is the count of the shards at hand.
    """
    if is_alone():
        return _count(sets, dtype)
    if inside_shard_map():
        return _count_apart(sets, dtype)

    @jax.custom_batching.custom_vmap
    def count(codes: Sequence[jax.Array]) -> jax.Array:
        ranks = tuple(code.ndim for code in codes)
        return _partitioned(ranks, len(sets), jnp.dtype(dtype))(*codes)

    @count.def_vmap
    def count_batch(
        size: int, is_batched: list[Any], codes: Sequence[jax.Array]
    ) -> tuple[jax.Array, bool]:
        del size
        axes = jax.tree.map(lambda batched: 0 if batched else None, is_batched)
        plain = jax.vmap(
            lambda codes: _count_apart(_decode(codes, len(sets)), dtype), in_axes=axes
        )
        return plain(codes), True

    return count([_encode(same) for same in zip(*sets, strict=True)])


def _encode(arrays: Sequence[jax.Array]) -> jax.Array:
    """One array of bits for one of each set, as the partitioner is slow with many."""
    bits = [a.astype(jnp.uint8) << which for which, a in enumerate(arrays)]
    return functools.reduce(jnp.bitwise_or, bits)


def _decode(codes: Sequence[jax.Array], number: int) -> Sets:
    return [[(code >> which) & 1 == 1 for code in codes] for which in range(number)]


def inside_shard_map() -> bool:
    """Whether arrays are shards, under `jax.shard_map` or `jax.pmap`."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def is_alone() -> bool:
    """Whether there is one device, so that nothing can be sharded."""
    return jax.device_count() == 1


@functools.cache
def _partitioned(ranks: tuple[int, ...], number: int, dtype: jnp.dtype) -> Any:
    """Counts where the partitioner puts the arrays.

    Left to itself it reduces, and exchanges, a count for each array.

    Args:
      ranks: dimensions of the arrays from `_encode`.
      number: of sets.
      dtype: of the counts.
    """

    def count(*codes: jax.Array) -> jax.Array:
        return _count_apart(_decode(codes, number), dtype)

    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        del result
        shardings = tuple(argument.sharding for argument in arguments)

        def count_shards(*codes: jax.Array) -> jax.Array:
            # What is traced here is of one device, whatever mesh the user has set.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                total = jnp.zeros(number, dtype)
                for sharding, code in zip(shardings, codes, strict=True):
                    # Of the devices that hold the same shard, the first one counts it.
                    share = _count(_decode([code], number), dtype)
                    total += jnp.where(_is_first_copy(mesh, sharding), share, 0)
                return jax.lax.psum(total, mesh.axis_names)

        return mesh, count_shards, NamedSharding(mesh, PartitionSpec()), shardings

    factors = [
        [f"a{index}x{axis}" for axis in range(rank)] for index, rank in enumerate(ranks)
    ]
    function = custom_partitioning(count)
    function.def_partition(
        partition=partition,
        infer_sharding_from_operands=lambda mesh, arguments, result: NamedSharding(
            mesh, PartitionSpec()
        ),
        sharding_rule=f"{', '.join(map(' '.join, factors))} -> sets",
        reduction_factors=tuple(factor for array in factors for factor in array),
    )
    return function


def _is_first_copy(mesh: Any, sharding: NamedSharding) -> jax.Array:
    used = {
        name
        for entry in sharding.spec
        for name in (entry if isinstance(entry, tuple) else (entry,))
    }
    first = jnp.ones([], bool)
    for name in mesh.axis_names:
        if name not in used:
            first &= jax.lax.axis_index(name) == 0
    return first


def _count(sets: Sets, dtype: jnp.dtype) -> jax.Array:
    """Of arrays that lie on one device."""
    if jax.default_backend() != "cpu":
        return _count_apart(sets, dtype)
    total = jnp.zeros(len(sets), dtype)
    for arrays in zip(*sets, strict=True):
        total += _count_together(arrays).astype(dtype)
    return total


def _count_apart(sets: Sets, dtype: jnp.dtype) -> jax.Array:
    return jnp.stack(
        [
            sum(jnp.sum(array, dtype=jnp.int32).astype(dtype) for array in arrays)
            for arrays in sets
        ]
    )


def _count_together(arrays: Sequence[jax.Array]) -> jax.Array:
    """Counts in arrays of one shape with one loop.

    XLA on CPU does not merge sums over one array into one loop, and computes each as a
    tree, several times slower than a plain loop; a reduction of many operands is one.
    """
    # A few rows, so that every core has work; on one device this moves nothing.
    rows = math.gcd(arrays[0].size, 16)
    counts = jax.lax.reduce(
        [array.reshape(rows, -1).astype(jnp.int32) for array in arrays],
        [jnp.zeros([], jnp.int32)] * len(arrays),
        lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)],
        [1],
    )
    return jnp.stack([jnp.sum(count) for count in counts])
