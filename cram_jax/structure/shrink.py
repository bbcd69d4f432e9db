"""Cutting removed channels out of parameters and of trees like them."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.paths import named_leaves
from cram_jax.structure.groups import (
    check_kept,
    has_groups,
    kept_groups,
    kept_positions,
    leaves_like,
)
from cram_jax.structure.labels import Kept
from cram_jax.structure.stacks import stacked_leaves
from cram_jax.structure.structure import Leaf, Structure


def shrink(structure: Structure, variables: Any, kept: Any) -> Any:
    """Cuts the channels that do not stay out of every array.

    Args:
      structure: from `trace_structure`, or a `Structure.part` for some of the
        variables.
      variables: a tree like those that were traced: parameters, batch statistics; or a
        tree that contains such trees, such as the state of an optimiser with arrays of
        the parameters' shapes (momentum, Adam, `optax.masked`, `optax.MultiSteps`);
        other leaves, such as counts, are unchanged. States that are factored or
        stacked (`optax.adafactor`, `optax.sm3`, `optax.lbfgs`) are refused.
      kept: one bool for each group, True where it stays, or a row of them for each
        layer, see `Family.layers`; or masks like the variables, as from
        `cram_jax.compress`.

    Returns:
      The tree with smaller arrays.

    Raises:
      TypeError: `kept` or the masks are traced, or `kept` is not bool.
      ValueError: the variables' paths or shapes are not those that were traced; an
        array in a state belongs to a parameter but has another shape; the masks do not
        remove whole groups; or all groups of a family would go.

    Example:
      >>> from cram_jax.structure import shrink, trace_structure
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> structure = trace_structure(apply, params, jnp.ones((1, 3)))
      >>> small = shrink(structure, params, np.array([True, False, True, False]))
      >>> jax.tree.map(jnp.shape, small)
      {'a': (3, 2), 'b': (2, 2)}
    """
    groups = as_kept(structure, kept)
    shapes = {leaf.path: leaf.shape for leaf in structure.leaves}

    def is_like(tree: Any) -> bool:
        # Or of some of the leaves, as what `optax.masked` leaves of a state.
        named = named_leaves(tree)
        return bool(named) and all(
            shapes.get(path) == np.shape(leaf) for path, leaf in named
        )

    trees = jax.tree.leaves(variables, is_leaf=is_like)
    treedef: Any = jax.tree.structure(variables, is_leaf=is_like)
    named = named_leaves(variables)
    if [path for path, _ in named] == list(shapes) or is_like(variables):
        leaves_like(structure, "variables", variables)
    else:
        likes = [is_like(tree) for tree in trees for _ in jax.tree.leaves(tree)]
        others = [pair for pair, like in zip(named, likes, strict=True) if not like]
        _check_others(structure, others, within_state=any(likes))
        if not any(likes):
            leaves_like(structure, "variables", variables)
    cut = [
        _shrink_tree(structure, tree, groups) if is_like(tree) else tree
        for tree in trees
    ]
    return treedef.unflatten(cut)


def _check_others(
    structure: Structure, others: Sequence[tuple[str, Any]], *, within_state: bool
) -> None:
    """Raises if a leaf outside of all trees like the parameters belongs to one."""
    owned = [
        (path, tuple(np.shape(array)), leaf)
        for path, array in others
        for leaf in structure.leaves
        if np.shape(array) and _belongs(path, leaf)
    ]
    wrong = [entry for entry in owned if entry[1] != entry[2].shape]
    if wrong or (owned and within_state):
        path, shape, leaf = (wrong or owned)[0]
        raise ValueError(
            f"variables[{path!r}] must have the shape {leaf.shape} of the parameter "
            f"{leaf.path!r}, in a tree of such arrays only, as momentum and Adam's "
            f"moments are; got {shape}. A state that is factored or stacked cannot be "
            f"cut: initialise it for the smaller parameters"
        )


def _belongs(path: str, leaf: Leaf) -> bool:
    """Whether a path ends in the parameter's, maybe with the numbers of a list."""
    own = re.escape(leaf.path)
    return not own or re.search(rf"(^|/){own}(/\d+)*$", path) is not None


def as_kept(structure: Structure, kept: Any) -> Kept:
    """Checks `kept`, or converts masks: one bool per group, or a row for each layer."""
    is_one_leaf = jax.tree_util.treedef_is_leaf(structure.treedef)
    if isinstance(kept, list | tuple) and all(
        isinstance(entry, bool | np.bool_) for entry in jax.tree.leaves(kept)
    ):
        kept = np.array(kept, bool)
    if jax.tree_util.all_leaves([kept]) and np.ndim(kept) <= 2 - is_one_leaf:
        return check_kept(structure, kept)
    return kept_groups(structure, kept)


def _shrink_tree(structure: Structure, tree: Any, kept: Kept) -> Any:
    named = named_leaves(tree)
    rows = np.atleast_2d(kept)
    stacked = stacked_leaves(structure, len(rows))
    described = {
        leaf.path: (leaf, of_layers)
        for leaf, of_layers in zip(structure.leaves, stacked, strict=True)
    }
    small = []
    for (path, _), array in zip(named, jax.tree.leaves(tree), strict=True):
        leaf, of_layers = described[path]
        for axis in range(len(leaf.shape)):
            if has_groups(leaf, axis):
                own = [kept_positions(leaf, axis, row) for row in rows]
                if of_layers and any((own[0] != other).any() for other in own):
                    array = _take_of_layers(array, own, axis)
                elif not own[0].all():
                    take = _module(array).take
                    array = take(array, np.flatnonzero(own[0]), axis=axis)
        small.append(array)
    treedef: Any = jax.tree.structure(tree)
    return treedef.unflatten(small)


def _take_of_layers(array: Any, positions: Sequence[Kept], axis: int) -> Any:
    """What stays of each layer along axis 0."""
    places = np.stack([np.flatnonzero(row) for row in positions])
    shape = [1] * np.ndim(array)
    shape[0], shape[axis] = places.shape
    taken = _module(array).take_along_axis(array, places.reshape(shape), axis)
    return taken


def _module(array: Any) -> Any:
    """Indexes an array; NumPy arrays stay on the host, in their dtype."""
    return np if isinstance(array, np.ndarray) else jnp


def small_shapes(structure: Structure, kept: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the smaller parameters, by path, to configure a smaller model.

    Args:
      structure: from `trace_structure`.
      kept: as for `shrink`.

    Returns:
      Shapes by path, such as for the layers of a smaller module.

    Raises:
      TypeError: `kept` or the masks are traced, or `kept` is not bool.
      ValueError: `kept` is not one bool for each group, the masks do not remove whole
        groups, or all groups of a family would go.

    Example:
      >>> from cram_jax.structure import small_shapes, trace_structure
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> structure = trace_structure(apply, params, jnp.ones((1, 3)))
      >>> small_shapes(structure, np.array([True, False, True, False]))
      {'a': (3, 2), 'b': (2, 2)}
    """
    groups = np.atleast_2d(as_kept(structure, kept))[0]
    return {
        leaf.path: tuple(
            int(kept_positions(leaf, axis, groups).sum()) if size != 1 else 1
            for axis, size in enumerate(leaf.shape)
        )
        for leaf in structure.leaves
    }
