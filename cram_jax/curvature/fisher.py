"""The inverse of a block-diagonal empirical Fisher matrix, as square roots.

Each block of weights has F = damping I + (1/m) sum g g^T over m gradients. We store a
root S with S S^T = F^-1, because single precision represents the root even if the
matrix itself is too badly conditioned, as most are at a damping of 1e-7. The diagonal
of F^-1 is then a sum of squares, never negative.

Arrays have the blocks along axis 0. Nothing crosses blocks, so sharded ones stay local.
Each gradient, and each weight that is removed, updates the whole root, so memory
bandwidth dominates. On a CPU we therefore process a few blocks at a time, which stay in
its cache for all updates.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from cram_jax.gradients import Gradient
from cram_jax.projector import Projection, widened
from cram_jax.reshaping import explicit_sharding, shards

# By default accelerators multiply float32 in less than float32.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

# Blocks that a CPU processes at a time: with 50 weights each, 1.3 MB of float32.
_PART = 128


def to_blocks(leaf: jax.Array, block_size: int, order: tuple[int, ...]) -> jax.Array:
    """Cuts a leaf into blocks of weights of the same output.

    With the outputs first in ``order``, weights that feed one output unit are
    neighbours, as in the paper.

    Args:
      leaf: any shape.
      block_size: weights in a block, at least 1.
      order: of the axes, slowest first, in which the leaf is flattened.

    Returns:
      Shape (blocks, block_size); a leaf smaller than that is one block of its own size.
      The last block is padded with zeros. If there are more than 128 blocks, their
      number is padded to a multiple of 128, unless explicit axes shard them.

    Example:
      >>> to_blocks(jnp.array([[1, 2], [3, 4], [5, 6]]), 4, (1, 0))
      Array([[1, 3, 5, 2],
             [4, 6, 0, 0]], dtype=int32)
    """
    width = max(1, min(block_size, leaf.size))
    rows = jnp.atleast_1d(jnp.transpose(leaf, order))
    sharding = _of_blocks(rows, width)
    if sharding is not None:
        rows = jax.sharding.reshard(rows, sharding)
    flat = jax.lax.reshape(rows, (leaf.size,), out_sharding=sharding)
    unit = width * _PART if sharding is None and leaf.size > width * _PART else width
    flat = jnp.pad(flat, (0, -leaf.size % unit))
    shape = (flat.size // width, width)
    return jax.lax.reshape(flat, shape, out_sharding=sharding)


def from_blocks(
    blocks: jax.Array, like: jax.Array, order: tuple[int, ...]
) -> jax.Array:
    """Undoes `to_blocks`: the shape and sharding of ``like``, the dtype of blocks."""
    rows = jnp.transpose(like, order)
    sharding = _of_blocks(jnp.atleast_1d(rows), blocks.shape[1])
    flat = jax.lax.reshape(blocks, (blocks.size,), out_sharding=sharding)
    rows = jax.lax.reshape(flat[: like.size], rows.shape, out_sharding=sharding)
    leaf = jnp.transpose(rows, tuple(order.index(axis) for axis in range(like.ndim)))
    explicit = explicit_sharding(like)
    return leaf if explicit is None else jax.sharding.reshard(leaf, explicit)


def _of_blocks(rows: jax.Array, width: int) -> NamedSharding | None:
    """How explicit axes shard blocks: along axis 0 of the rows.

    Replicated if a block would lie across two devices.
    """
    explicit = explicit_sharding(rows)
    if explicit is None:
        return None
    outputs = explicit.spec[0] if explicit.spec else None
    if rows.size // shards(explicit, outputs) % width:
        outputs = None
    return NamedSharding(explicit.mesh, PartitionSpec(outputs))


def damped_root(blocks: jax.Array, damping: float) -> jax.Array:
    """The root of the inverse before the first gradient: I / sqrt(damping).

    Args:
      blocks: shape (n, b), floating.
      damping: above 0.

    Returns:
      Shape (n, b, b), the dtype of ``blocks``.
    """
    one = jnp.eye(blocks.shape[1], dtype=blocks.dtype)
    # Computed from the blocks, so that it is sharded like them.
    return jnp.zeros_like(blocks)[:, :, None] + one[None] / damping**0.5


def rank_one_update(root: jax.Array, gradient: jax.Array) -> jax.Array:
    r"""Adds g g^T to every block of the matrix, by updating the root of its inverse.

    The Sherman-Morrison formula for a root (Potter, 1963): with
    :math:`v = S^T g` and :math:`c = \sqrt{1 + v^T v}`

    .. math:: S \gets S - \frac{(S v) v^T}{c (c + 1)}

    Args:
      root: shape (n, b, b).
      gradient: shape (n, b).

    Returns:
      The new root.

    Example:
      >>> root = jnp.ones((1, 1, 1))
      >>> rank_one_update(root, jnp.sqrt(jnp.array([[3.0]])))  # 1 / (1 + 3)
      Array([[[0.5]]], dtype=float32)
    """
    v = _einsum("nij,ni->nj", root, gradient)
    c = jnp.sqrt(1 + jnp.sum(v**2, axis=-1, keepdims=True))
    along = _einsum("nij,nj->ni", root, v) / (c * (c + 1))
    return root - along[:, :, None] * v[:, None, :]


def rank_one_updates(
    root: jax.Array, gradients: jax.Array, count: jax.Array
) -> jax.Array:
    """Adds the first ``count`` gradients, one after the other.

    Args:
      root: shape (n, b, b).
      gradients: shape (n, m, b).
      count: how many of the m.

    Returns:
      The new root.
    """

    def update(root: jax.Array, gradients: jax.Array) -> jax.Array:
        def add(i: jax.Array, root: jax.Array) -> jax.Array:
            return rank_one_update(root, gradients[:, i])

        return jax.lax.fori_loop(0, count, add, root)

    return _in_parts(update, root, gradients)


def saliency_root(root: jax.Array, weights: jax.Array) -> jax.Array:
    r"""Roots of the saliencies :math:`\rho_i = w_i^2 / (2 [F^{-1}]_{ii})`.

    A saliency is the smallest increase of the loss, to second order, for which the
    weight can be removed. The roots have the same order and do not underflow.

    Args:
      root: shape (n, b, b).
      weights: shape (n, b).

    Returns:
      Shape (n, b).
    """
    diagonal = jnp.sum(root**2, axis=-1)
    # It may underflow to 0, and 0 / 0 would be NaN.
    diagonal = jnp.maximum(diagonal, jnp.finfo(diagonal.dtype).tiny)
    return jnp.abs(weights) / jnp.sqrt(2 * diagonal)


def remove_weights(
    weights: jax.Array, removed: jax.Array, root: jax.Array
) -> jax.Array:
    r"""Removes weights, and moves the others of each block to compensate.

    To second order, the loss with the weights Q of a block at zero is smallest after

    .. math:: \delta w = -F^{-1} E_Q (E_Q^T F^{-1} E_Q)^{-1} E_Q^T w_Q

    which is the joint solution for Q, not a sum of updates for single weights. It is
    computed weight by weight: each step removes one and eliminates it from the root, so
    that the next is removed from a problem without it. On the root this is the modified
    Gram-Schmidt process over the rows of Q.

    Args:
      weights: shape (n, b).
      removed: bool, shape (n, b): the weights Q of every block.
      root: shape (n, b, b).

    Returns:
      The new weights, exactly zero where removed.

    Example:
      >>> root = jnp.array([[[1.0, 0.0], [1.0, 1.0]]])  # F^-1 = [[1, 1], [1, 2]]
      >>> remove_weights(jnp.array([[3.0, 5.0]]), jnp.array([[True, False]]), root)
      Array([[0., 2.]], dtype=float32)
    """

    def update(weights: jax.Array, removed: jax.Array, root: jax.Array) -> jax.Array:
        def remove(
            place: jax.Array, carry: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            weights, root = carry
            row = root[:, place]
            square = jnp.sum(row**2, axis=-1)
            active = removed[:, place] & (square > 0)
            along = _einsum("nij,nj->ni", root, row)
            along /= jnp.where(active, square, 1)[:, None]
            along = jnp.where(active[:, None], along, 0)
            weights = weights - along * weights[:, place, None]
            return weights, root - along[:, :, None] * row[:, None, :]

        places = weights.shape[1]
        return jax.lax.fori_loop(0, places, remove, (weights, root))[0]

    return jnp.where(removed, 0, _in_parts(update, weights, removed, root))


def _in_parts(
    update: Callable[..., jax.Array], array: jax.Array, *others: jax.Array
) -> jax.Array:
    """``update(array, *others)``, shaped like ``array``; on a CPU in parts.

    All arrays have the blocks along axis 0.
    """

    def in_parts(*arrays: jax.Array) -> jax.Array:
        # Parts are strided, so that each device holds its share of every part.
        split, *rest = (a.reshape(_PART, -1, *a.shape[1:]) for a in arrays)

        def one(part: jax.Array, split: jax.Array) -> jax.Array:
            taken = (
                jax.lax.dynamic_index_in_dim(a, part, 1, keepdims=False)
                for a in (split, *rest)
            )
            return jax.lax.dynamic_update_index_in_dim(split, update(*taken), part, 1)

        done = jax.lax.fori_loop(0, blocks // _PART, one, split)
        return done.reshape(array.shape)

    blocks = array.shape[0]
    if blocks % _PART or explicit_sharding(array) is not None:
        return update(array, *others)
    return jax.lax.platform_dependent(array, *others, cpu=in_parts, default=update)


class Place(NamedTuple):
    """A leaf that is cut into blocks.

    Attributes:
      leaf: its index in ``jax.tree.leaves``.
      order: see `to_blocks`.
      stack: the axes along which layers are stacked.
    """

    leaf: int
    order: tuple[int, ...]
    stack: tuple[int, ...]


class Inputs(NamedTuple):
    """Arguments of the loss by name; ``examples`` hold the examples along axis 0."""

    examples: dict[str, Any]
    constants: dict[str, Any]


class Options(NamedTuple):
    """How the Fisher matrix is computed: see `second_order`.

    Attributes:
      gradients: their number m.
      examples_per_gradient: how many examples each gradient averages over.
      micro_batch: gradients computed at a time.
      block_size: weights in a block.
      damping: added to the diagonal.
    """

    gradients: int
    examples_per_gradient: int
    micro_batch: int
    block_size: int
    damping: float


def first_roots(
    params: Any, places: Sequence[Place], options: Options
) -> list[jax.Array]:
    """The root of the inverse for every block of some leaves, before any gradient.

    Args:
      params: a pytree of arrays.
      places: which leaves.
      options: see `Options`.

    Returns:
      For each leaf the roots, shape (n, b, b), float32 or wider.
    """
    leaves = jax.tree.leaves(params)
    return [
        damped_root(
            to_blocks(widened(leaves[place.leaf]), options.block_size, place.order),
            options.damping,
        )
        for place in places
    ]


def add_micro_batch(
    roots: list[jax.Array],
    start: jax.Array,
    projection: Projection,
    inputs: Inputs,
    places: Sequence[Place],
    gradient: Gradient,
    options: Options,
) -> tuple[list[jax.Array], jax.Array]:
    """Adds some gradients of the loss to the matrix.

    Pruned weights get no gradient, as if they were not part of the model.

    Args:
      roots: from `first_roots`, or from here.
      start: number of the first gradient, int32 scalar.
      projection: the parameters, and the masks of the weights not pruned yet.
      inputs: the arguments of the loss.
      places: which leaves.
      gradient: of the loss, from `gradient_of`.
      options: see `Options`; ``micro_batch`` gradients are added, or those left.

    Returns:
      The new roots; and which gradients they can hold, bool, shape (micro_batch,
      leaves): those that are finite, and whose squares over the damping are.
    """
    count, group, micro_batch, block_size, damping = options
    kept = jax.tree.leaves(projection.masks)

    def blocks_of_gradient(
        examples: jax.Array,
    ) -> tuple[list[jax.Array], jax.Array]:
        batch = jax.tree.map(lambda array: array[examples], inputs.examples)
        _, tree = gradient(projection.params, {**inputs.constants, **batch})
        gradients = jax.tree.leaves(tree)
        # So that the sum of g g^T is the mean over gradients.
        chosen = [
            jnp.where(kept[place.leaf], widened(gradients[place.leaf]) / count**0.5, 0)
            for place in places
        ]
        # No product in `rank_one_update` is above this one.
        finite = [jnp.isfinite(jnp.sum(g**2) / damping) for g in chosen]
        blocks = [
            to_blocks(g, block_size, place.order)
            for g, place in zip(chosen, places, strict=True)
        ]
        return blocks, jnp.stack(finite)

    within = jnp.arange(group, dtype=start.dtype)
    numbers = start + jnp.arange(micro_batch, dtype=start.dtype)
    examples = jnp.minimum(numbers, count - 1)[:, None] * group + within[None]
    gradients, finite = jax.vmap(blocks_of_gradient)(examples)
    last = jnp.minimum(micro_batch, count - start)
    roots = [
        rank_one_updates(root, jnp.swapaxes(g, 0, 1), last)
        for root, g in zip(roots, gradients, strict=True)
    ]
    return roots, finite
