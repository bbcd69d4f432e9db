"""The inverse of an empirical Fisher matrix in blocks, as square roots.

Every block of weights has F = damping I + (1/m) sum g g^T over m gradients, and what is
kept is a root S with S S^T = F^-1. Single precision holds the root of a matrix that is
too badly conditioned to be held itself: with a damping of 1e-7 most of them are. The
diagonal of F^-1 is a sum of squares, never negative.

Arrays have the blocks along axis 0 and nothing crosses them: sharded blocks stay put.
Every gradient, and every weight that is removed, changes all of a root, and what takes
the time are passes over memory. A CPU therefore takes some blocks at a time, which stay
in its cache for all that is done with them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from cram_jax.gradients import Gradient
from cram_jax.projector import Projection
from cram_jax.reshaping import explicit_sharding, shards

# By default accelerators multiply float32 in less than float32.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

# Blocks that a CPU takes at a time: with 50 weights each they are 1.3 MB of float32.
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
      Shape (blocks, block_size), where a smaller leaf is one block of its own size. The
      last block is filled up with zeros; where there are more than 128, so is their
      number, to a multiple of that, unless explicit axes spread them over devices.

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
    """Over which devices explicit axes spread blocks: along axis 0 of the rows.

    Copies on all devices where a block would lie across two of them.
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
    # Made from the blocks, so that it is sharded as they are.
    return jnp.zeros_like(blocks)[:, :, None] + one / damping**0.5


def absorb(root: jax.Array, gradient: jax.Array) -> jax.Array:
    r"""Adds g g^T to every block of the matrix, in the root of its inverse.

    The formula of Sherman and Morrison for a root (Potter, 1963): with
    :math:`v = S^T g` and :math:`c = \sqrt{1 + v^T v}`

    .. math:: S \gets S - \frac{(S v) v^T}{c (c + 1)}

    Args:
      root: shape (n, b, b).
      gradient: shape (n, b), in units in which g g^T is what is added.

    Returns:
      The new root.

    Example:
      >>> absorb(jnp.ones((1, 1, 1)), jnp.sqrt(jnp.array([[3.0]])))  # 1 / (1 + 3)
      Array([[[0.5]]], dtype=float32)
    """
    v = _einsum("nij,ni->nj", root, gradient)
    c = jnp.sqrt(1 + jnp.sum(v**2, axis=-1, keepdims=True))
    along = _einsum("nij,nj->ni", root, v) / (c * (c + 1))
    return root - along[:, :, None] * v[:, None, :]


def absorb_all(root: jax.Array, gradients: jax.Array, count: jax.Array) -> jax.Array:
    """Adds the first gradients, one after the other.

    Args:
      root: shape (n, b, b).
      gradients: shape (n, m, b).
      count: how many of the m.

    Returns:
      The new root.
    """

    def update(root: jax.Array, gradients: jax.Array) -> jax.Array:
        def add(i: jax.Array, root: jax.Array) -> jax.Array:
            return absorb(root, gradients[:, i])

        return jax.lax.fori_loop(0, count, add, root)

    return _in_parts(update, root, gradients)


def saliency_root(root: jax.Array, weights: jax.Array) -> jax.Array:
    r"""Roots of the saliencies :math:`\rho_i = w_i^2 / (2 [F^{-1}]_{ii})`.

    A saliency is the least increase of the loss, to second order, at which the weight
    can be removed. Their roots are in the same order, and do not underflow.

    Args:
      root: shape (n, b, b).
      weights: shape (n, b).

    Returns:
      Shape (n, b).
    """
    diagonal = jnp.sum(root**2, axis=-1)
    # It may round to 0: a weight that is 0 then has no saliency, any other the most.
    diagonal = jnp.maximum(diagonal, jnp.finfo(diagonal.dtype).tiny)
    return jnp.abs(weights) / jnp.sqrt(2 * diagonal)


def eliminate(weights: jax.Array, removed: jax.Array, root: jax.Array) -> jax.Array:
    r"""Removes weights, and moves the others of their blocks where that costs least.

    To second order the loss is least, with the weights Q of a block at zero, after

    .. math:: \delta w = -F^{-1} E_Q (E_Q^T F^{-1} E_Q)^{-1} E_Q^T w_Q

    the solution for all of Q together, and not a sum of updates for one weight each. It
    is computed weight by weight: each step removes one, and takes it out of the root,
    so that the next is removed from a problem without it. On the root this is the
    modified Gram-Schmidt process over the rows of Q.

    Args:
      weights: shape (n, b).
      removed: bool, shape (n, b): the weights Q of every block.
      root: shape (n, b, b).

    Returns:
      The new weights, exactly zero where removed.

    Example:
      >>> root = jnp.array([[[1.0, 0.0], [1.0, 1.0]]])  # F^-1 = [[1, 1], [1, 2]]
      >>> eliminate(jnp.array([[3.0, 5.0]]), jnp.array([[True, False]]), root)
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
    """``update(array, *others)``, like ``array``; on a CPU some blocks at a time.

    All have the blocks along axis 0.
    """

    def in_parts(*arrays: jax.Array) -> jax.Array:
        # A part has blocks from everywhere: each device has its share of it.
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
    """What the loss is given: arguments by name, with examples along axis 0 or not."""

    examples: dict[str, Any]
    constants: dict[str, Any]


class Options(NamedTuple):
    """How the Fisher matrix is computed: see `second_order_prune`.

    Attributes:
      gradients: how many, m.
      examples_per_gradient: over how many examples each is averaged.
      micro_batch: how many are computed at a time.
      block_size: weights in a block.
      damping: what the diagonal starts from.
    """

    gradients: int
    examples_per_gradient: int
    micro_batch: int
    block_size: int
    damping: float


def inverse_roots(
    gradient: Gradient,
    projection: Projection,
    places: Sequence[Place],
    inputs: Inputs,
    options: Options,
) -> tuple[list[jax.Array], jax.Array]:
    """The root of the inverse for every block of some leaves.

    What is pruned has no gradient: the others are as if it were not there.

    Args:
      gradient: of the loss, from `gradient_of`.
      projection: the parameters, and the masks of what is not pruned.
      places: which leaves.
      inputs: the arguments of the loss.
      options: see there.

    Returns:
      For each leaf the roots, shape (n, b, b), float32 or wider; and which gradients
      they can hold, bool, shape (gradients, leaves): those that are finite, and whose
      squares over the damping are.
    """
    count, group, micro_batch, block_size, damping = options
    micro_batch = min(micro_batch, count)
    kept = jax.tree.leaves(projection.masks)
    leaves = jax.tree.leaves(projection.params)

    def blocks_of_gradient(
        examples: jax.Array,
    ) -> tuple[list[jax.Array], jax.Array]:
        batch = jax.tree.map(lambda array: array[examples], inputs.examples)
        _, tree = gradient(projection.params, {**inputs.constants, **batch})
        gradients = jax.tree.leaves(tree)
        # Of F, the sum over gradients is divided by their number.
        chosen = [
            jnp.where(kept[place.leaf], wide(gradients[place.leaf]) / count**0.5, 0)
            for place in places
        ]
        # No product in `absorb` is above this one.
        finite = [jnp.isfinite(jnp.sum(g**2) / damping) for g in chosen]
        blocks = [
            to_blocks(g, block_size, place.order)
            for g, place in zip(chosen, places, strict=True)
        ]
        return blocks, jnp.stack(finite)

    def absorb_micro_batch(
        roots: list[jax.Array], start: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        numbers = start + jnp.arange(micro_batch)
        examples = jnp.minimum(numbers, count - 1)[:, None] * group + jnp.arange(group)
        gradients, finite = jax.vmap(blocks_of_gradient)(examples)
        last = jnp.minimum(micro_batch, count - start)
        return [
            absorb_all(root, jnp.swapaxes(g, 0, 1), last)
            for root, g in zip(roots, gradients, strict=True)
        ], finite

    roots = [
        damped_root(
            to_blocks(wide(leaves[place.leaf]), block_size, place.order), damping
        )
        for place in places
    ]
    starts = jnp.arange(0, count, micro_batch)
    roots, finite = jax.lax.scan(absorb_micro_batch, roots, starts)
    return roots, finite.reshape(-1, len(places))[:count]


def wide(leaf: jax.Array) -> jax.Array:
    """In the precision of the statistics: float32, or more where the leaf has more."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
