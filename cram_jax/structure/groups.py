"""Converts between groups that stay and masks of the parameters."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.paths import named_leaves
from cram_jax.structure.labels import Ids, Kept
from cram_jax.structure.stacks import one_layer, stacked_leaves, unstacked
from cram_jax.structure.structure import Leaf, Structure


def group_masks(structure: Structure, kept: Any) -> Any:
    """The masks that remove whole groups.

    Args:
      structure: of the parameters.
      kept: one bool for each group, True where it stays; may be traced. Or a row of
        them for each layer, see `Family.layers`.

    Returns:
      A tree like the parameters: bool, False at every entry that belongs to a removed
      group along any of its axes.

    Example:
      >>> from cram_jax.structure import group_masks, trace_structure
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 2))}
      >>> structure = trace_structure(apply, params, jnp.ones((1, 1)))
      >>> group_masks(structure, jnp.array([True, False, True]))["a"]
      Array([[ True, False,  True]], dtype=bool)
    """
    if isinstance(kept, list | tuple):
        kept = np.array(kept)
    return structure.treedef.unflatten(_leaf_masks(structure, kept))


def _leaf_masks(structure: Structure, kept: Any) -> list[Any]:
    if kept.ndim == 1:
        return [_leaf_mask(leaf, kept) for leaf in structure.leaves]
    stacked = stacked_leaves(structure, len(kept))
    masks = []
    for leaf, of_layers in zip(structure.leaves, stacked, strict=True):
        if not of_layers:
            masks.append(_leaf_mask(leaf, kept[0]))
        elif isinstance(kept, np.ndarray):
            masks.append(np.stack([_leaf_mask(unstacked(leaf), row) for row in kept]))
        else:
            masks.append(jax.vmap(partial(_leaf_mask, unstacked(leaf)))(kept))
    return masks


def _leaf_mask(leaf: Leaf, kept: Any) -> Any:
    xp: Any = np if isinstance(kept, np.ndarray) else jnp
    mask = xp.ones(leaf.shape, bool)
    for axis in range(len(leaf.shape)):
        if has_groups(leaf, axis):
            shape = [-1 if other == axis else 1 for other in range(len(leaf.shape))]
            mask = mask & kept_positions(leaf, axis, kept).reshape(shape)
    return mask


def has_groups(leaf: Leaf, axis: int) -> bool:
    """Whether any position of the axis may be removed."""
    return any((groups >= 0).any() for groups in leaf.groups[axis])


def kept_positions(leaf: Leaf, axis: int, kept: Any) -> Any:
    """Which positions of an axis stay: bool, a NumPy or JAX array as `kept` is."""
    xp: Any = np if isinstance(kept, np.ndarray) else jnp
    positions = xp.ones(1, bool)
    for groups in leaf.groups[axis]:
        positions = (positions[:, None] & _kept_of(kept, groups, xp)).reshape(-1)
    return positions


def _kept_of(kept: Any, groups: Ids, xp: Any) -> Any:
    """Whether each group stays; a slice if possible, since gathers compile slowly."""
    if (groups < 0).all():
        return xp.ones(len(groups), bool)
    first = int(groups[0])
    if first >= 0 and np.array_equal(groups, first + np.arange(len(groups))):
        return kept[first : first + len(groups)]
    return xp.append(kept, True)[groups]  # frozen ones are at index -1


def kept_groups(structure: Structure, masks: Any) -> Kept:
    """The groups that masks keep.

    Args:
      structure: of the parameters that the masks belong to; see `Structure.part`.
      masks: a tree like the parameters, bool, as from `cram_jax.compress`.

    Returns:
      One bool for each group: True where it stays. If layers that are stacked for a
      scan lose different channels, a row of them for each layer.

    Raises:
      TypeError: the masks are traced.
      ValueError: the masks do not remove whole groups, or remove all groups of a
        family, or their paths or shapes are not those that were traced.

    Example:
      From a checkpoint that holds zeros and no masks:

      >>> from cram_jax.structure import kept_groups, trace_structure
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> params = {"a": np.array([[0.0, 3.0]]), "b": np.array([[0.0], [2.0]])}
      >>> structure = trace_structure(apply, params, jnp.ones((1, 1)))
      >>> kept_groups(structure, jax.tree.map(lambda leaf: leaf != 0, params))
      array([False,  True])
    """
    leaves = leaves_like(structure, "masks", masks)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError(
            "masks must be concrete, because shapes depend on them; got traced ones: "
            "call it outside of jax.jit"
        )
    arrays = [np.asarray(leaf, bool) for leaf in leaves]
    kept = _find_kept(structure.leaves, arrays, structure.size)
    for layers in sorted({family.layers for family in structure.families} - {1}):
        if _first_wrong(structure, arrays, kept) is None:
            break
        rows = _find_rows(structure, arrays, layers)
        if _first_wrong(structure, arrays, rows) is None:
            kept = rows
    wrong = _first_wrong(structure, arrays, kept)
    if wrong is not None:
        leaf, mask, place = wrong
        raise ValueError(
            f"masks must remove whole groups of channels, but masks[{leaf.path!r}] is "
            f"{bool(mask[place])} at {place}, against the rest of its group"
        )
    return check_kept(structure, kept)


def _find_kept(leaves: Sequence[Leaf], masks: Sequence[Kept], size: int) -> Kept:
    """The groups of which a mask keeps any entry."""
    kept: Kept = np.zeros(size, bool)
    for leaf, mask in zip(leaves, masks, strict=True):
        for axis in range(mask.ndim):
            if has_groups(leaf, axis):
                _add_kept(kept, leaf, axis, mask)
    return kept


def _find_rows(structure: Structure, masks: Sequence[Kept], layers: int) -> Kept:
    """The same for each layer."""
    one = one_layer(structure, layers).leaves
    stacked = stacked_leaves(structure, layers)
    rows = [
        [mask[layer] if s else mask for mask, s in zip(masks, stacked, strict=True)]
        for layer in range(layers)
    ]
    found: Kept = np.stack([_find_kept(one, row, structure.size) for row in rows])
    return found


def _first_wrong(
    structure: Structure, masks: Sequence[Kept], kept: Kept
) -> tuple[Leaf, Kept, tuple[int, ...]] | None:
    """The first entry at which masks contradict these groups."""
    expected = _leaf_masks(structure, kept)
    for leaf, mask, right in zip(structure.leaves, masks, expected, strict=True):
        wrong = mask != right
        if wrong.any():
            return leaf, mask, tuple(int(i[0]) for i in np.nonzero(wrong))
    return None


def _add_kept(kept: Kept, leaf: Leaf, axis: int, mask: Kept) -> None:
    others = tuple(other for other in range(mask.ndim) if other != axis)
    sizes = [len(groups) for groups in leaf.groups[axis]]
    grid: Any = np.any(mask, axis=others).reshape(sizes)
    for part, groups in enumerate(leaf.groups[axis]):
        rest = tuple(other for other in range(grid.ndim) if other != part)
        stays = grid.any(axis=rest) & (groups >= 0)
        kept[groups[stays]] = True


def check_kept(structure: Structure, kept: Any) -> Kept:
    """Returns `kept` as NumPy bools: one for each group, or a row for each layer.

    Raises:
      TypeError: it is traced, or not of bools.
      ValueError: it is not one bool for each group, or removes all groups of a family;
        or its rows differ in a family without that many layers, or keep different
        numbers.
    """
    if isinstance(kept, jax.core.Tracer):
        raise TypeError(
            "kept must be concrete, because shapes depend on it; got a traced array: "
            "call it outside of jax.jit"
        )
    array = np.asarray(kept)
    if array.dtype != np.bool_:
        raise TypeError(f"kept must be bool, got {array.dtype}")
    if array.ndim not in (1, 2) or array.shape[-1:] != (structure.size,):
        raise ValueError(
            f"kept must have one bool for each of {structure.size} groups, "
            f"got shape {array.shape}"
        )
    rows = np.atleast_2d(array)
    for number, family in enumerate(structure.families):
        of_family = rows[:, family.groups]
        counts = of_family.sum(axis=1)
        if not counts.all():
            raise ValueError(
                f"kept removes all {family.size} groups of family {number} "
                f"({', '.join(family.names)}); at least one must stay"
            )
        differ = (of_family != of_family[0]).any()
        if differ and family.layers != len(rows):
            raise ValueError(
                f"kept has {len(rows)} rows that differ in family {number} "
                f"({', '.join(family.names)}), which is not one of {len(rows)} layers"
            )
        if (counts != counts[0]).any():
            raise ValueError(
                f"kept must keep as many groups in each layer, got {counts.tolist()} "
                f"of family {number} ({', '.join(family.names)})"
            )
    return array


def leaves_like(structure: Structure, name: str, tree: Any) -> list[Any]:
    """The leaves of a tree that has the structure's paths and shapes.

    Args:
      structure: of the parameters.
      name: of the argument, for the error.
      tree: must be like the parameters; an NNX State or its pure tree.

    Raises:
      ValueError: a path or a shape differs.
    """
    leaves = named_leaves(tree)
    _check_paths(structure, name, [path for path, _ in leaves])
    for (path, array), leaf in zip(leaves, structure.leaves, strict=True):
        if tuple(np.shape(array)) != leaf.shape:
            raise ValueError(
                f"{name}[{path!r}] must have the shape {leaf.shape} that was traced, "
                f"got {tuple(np.shape(array))}"
            )
    return [array for _, array in leaves]


def _check_paths(structure: Structure, name: str, paths: Sequence[str]) -> None:
    expected = [leaf.path for leaf in structure.leaves]
    if list(paths) != expected:
        missing = sorted(set(expected) - set(paths))[:3]
        extra = sorted(set(paths) - set(expected))[:3]
        raise ValueError(
            f"{name} must have the {len(expected)} leaves that were traced; "
            f"missing {missing}, unexpected {extra} (see Structure.part for some of "
            f"the variables)"
        )
