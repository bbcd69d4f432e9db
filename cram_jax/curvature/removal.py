"""One step of second-order pruning, once the curvature is known."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from cram_jax.curvature import fisher
from cram_jax.curvature.finite import all_finite
from cram_jax.projector import Projection, widened
from cram_jax.selection import keep_largest, keep_largest_of_layers


def prune_to(
    projection: Projection,
    roots: list[jax.Array],
    counts: list[int | jax.Array],
    places: tuple[fisher.Place, ...],
    scope: Literal["global", "layer"],
    width: int,
) -> tuple[Projection, jax.Array, jax.Array]:
    """Removes the weights whose saliencies are least, and moves the others.

    Args:
      projection: the parameters, and the masks of the weights not pruned yet.
      roots: of the inverse Fisher matrix, from `fisher.add_micro_batch`.
      counts: weights to keep: of all leaves together, or of each.
      places: which leaves.
      scope: "global" or "layer".
      width: weights in a block.

    Returns:
      The new projection; and whether each leaf was finite before and after, bool, shape
      (leaves,).
    """
    leaves, kept = map(jax.tree.leaves, projection)
    structure: Any = jax.tree.structure(projection.params)
    chosen = [leaves[place.leaf] for place in places]
    weights = [
        fisher.to_blocks(widened(leaf), width, place.order)
        for leaf, place in zip(chosen, places, strict=True)
    ]
    ranks = [
        _ranks(fisher.saliency_root(root, w), kept[place.leaf], place.order)
        for place, w, root in zip(places, weights, roots, strict=True)
    ]
    if scope == "global":
        largest = list(keep_largest(ranks, counts[0]))
    else:
        largest = [
            keep_largest_of_layers(rank, count, place.stack)
            for rank, count, place in zip(ranks, counts, places, strict=True)
        ]
    for place, w, root, mask in zip(places, weights, roots, largest, strict=True):
        i = place.leaf
        kept[i] = kept[i] & mask
        removed = ~fisher.to_blocks(kept[i], width, place.order)
        moved = fisher.remove_weights(w, removed, root)
        moved = fisher.from_blocks(moved, leaves[i], place.order)
        leaves[i] = moved.astype(leaves[i].dtype)
    before, after = all_finite(chosen), all_finite([leaves[p.leaf] for p in places])
    pruned = Projection(structure.unflatten(leaves), structure.unflatten(kept))
    return pruned, before, after


def _ranks(saliencies: jax.Array, kept: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """In the shape of the leaf; above 0 for entries kept so far, even zeros."""
    ranks = fisher.from_blocks(saliencies, kept, order)
    return jnp.where(kept, jnp.maximum(ranks, jnp.finfo(ranks.dtype).tiny), 0)
