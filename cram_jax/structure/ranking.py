"""How much each group of channels matters."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.projector import safe_denominator
from cram_jax.structure.groups import leaves_like
from cram_jax.structure.structure import Family, Member, Structure

Rank: TypeAlias = Callable[[Structure, Any], jax.Array]
"""From the structure and the parameters to a score per group; the largest stay."""


def producer_norm(structure: Structure, params: Any) -> jax.Array:
    """Root mean square of the weights that compute a channel, relative to its family.

    Of the kernels that compute the channels of a family, each channel's slice is
    squared and averaged. Dividing by the root mean square of the family makes layers
    comparable, whatever their scale. If none of the kernels is among the parameters,
    everything that the family has there counts.

    Args:
      structure: of the parameters.
      params: a tree like those that were traced.

    Returns:
      One float32 for each group.

    Raises:
      ValueError: the parameters hold nothing of a family, or their paths or shapes are
        not those that were traced.

    Example:
      >>> from cram_jax.structure import producer_norm, trace_structure
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.array([[1.0, 7.0]]), "b": jnp.ones((2, 3))}
      >>> structure = trace_structure(apply, params, jnp.ones((1, 1)))
      >>> producer_norm(structure, params)
      Array([0.2, 1.4], dtype=float32)
    """
    leaves = leaves_like(structure, "params", params)
    scores = []
    for number, family in enumerate(structure.families):
        members = [m for m in family.members if m.produces] or list(family.members)
        if not members:
            raise ValueError(
                f"params must hold some of the channels of family {number}, got none; "
                f"trace a structure of all that is to be ranked"
            )
        squares, count = _squares_and_counts(structure, family, members, leaves)
        means = squares / jnp.asarray(count, jnp.float32)
        scores.append(jnp.sqrt(means / safe_denominator(jnp.mean(means))))
    return jnp.concatenate(scores) if scores else jnp.zeros(0)


def _squares_and_counts(
    structure: Structure, family: Family, members: list[Member], leaves: list[Any]
) -> tuple[jax.Array, np.ndarray[Any, Any]]:
    """Sums of squares and numbers of entries, one for each group of the family."""
    total = jnp.zeros(family.size, jnp.float32)
    count = np.zeros(family.size)
    for member in members:
        leaf = structure.leaves[member.leaf]
        groups = leaf.groups[member.axis][member.part]
        parts = [len(part) for part in leaf.groups[member.axis]]
        sizes = jnp.abs(jnp.asarray(leaves[member.leaf]))  # of complex numbers, too
        squares = jnp.square(sizes.astype(jnp.float32))
        others = tuple(i for i in range(len(leaf.shape)) if i != member.axis)
        grid = jnp.sum(squares, axis=others).reshape(parts)
        rest = tuple(i for i in range(len(parts)) if i != member.part)
        positions = jnp.sum(grid, axis=rest)
        own = np.flatnonzero(
            (groups >= family.start) & (groups < family.start + family.size)
        )
        places = groups[own] - family.start
        in_order = np.arange(family.size)
        if np.array_equal(own, in_order) and np.array_equal(places, in_order):
            total = total + positions[: family.size]
        else:
            total = total.at[places].add(positions[own])
        np.add.at(count, places, np.prod(leaf.shape) / len(groups))
    return total, count
