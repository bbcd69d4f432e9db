"""The leaves of parameters by their paths."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from cram_jax.projector import Params, check_structure, leaf_path

T = TypeVar("T", bound=Hashable)


def named_leaves(tree: Params, types: tuple[type, ...] = ()) -> list[tuple[str, Any]]:
    """Each leaf with its path, in the order of ``jax.tree.leaves``.

    An NNX Variable has the path of its value. So paths in the NNX State that
    `flax.nnx.Optimizer` passes to ``init`` are those in the pure tree of ``update``.
    The same holds for the metadata that Linen puts around a parameter.

    Args:
      tree: a pytree.
      types: of nodes that count as leaves.

    Returns:
      Pairs of path and leaf.

    Example:
      >>> named_leaves({"dense": {"bias": 1, "kernel": 2}})
      [('dense/bias', 1), ('dense/kernel', 2)]
    """

    def is_leaf(node: Any) -> bool:
        return isinstance(node, types) or _is_box(node)

    named = []
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_leaf):
        if not _is_box(node):
            named.append((leaf_path(path), node))
            continue
        for inner, leaf in jax.tree.leaves_with_path(
            node, is_leaf=lambda node: isinstance(node, types)
        ):
            named.append((leaf_path((*path, *inner[1:])), leaf))
    return named


def _is_box(node: Any) -> bool:
    """Whether it is a Variable of NNX, or what Linen's `with_partitioning` makes."""
    # By name, because this package does not depend on Flax.
    return any(
        (parent.__name__ == "Variable" and parent.__module__.startswith("flax.nnx."))
        or (parent.__name__, parent.__module__) == ("AxisMetadata", "flax.core.meta")
        for parent in type(node).__mro__
    )


@dataclass(frozen=True, repr=False)
class ByPath(Generic[T]):
    """A tree as a value: its entries by path.

    Attributes:
      entries: pairs of path and leaf.
    """

    entries: tuple[tuple[str, T], ...]

    def __repr__(self) -> str:
        return repr(dict(self.entries))

    def like(self, name: str, params: Params) -> list[T]:
        """The entries in the order of the parameters' leaves.

        Args:
          name: of the argument, for the error.
          params: whose structure the tree must have.

        Raises:
          ValueError: the tree has other paths than the parameters.
        """
        expected = [path for path, _ in named_leaves(params)]
        # None is an entry where params have a leaf, and no leaf where they have None.
        known = set(expected)
        entries = [(p, e) for p, e in self.entries if e is not None or p in known]
        own = [path for path, _ in entries]
        if own != expected:
            raise ValueError(
                f"{name}, if it is not a function, must have the structure of params "
                f"with the leaves {expected}, got {own}"
            )
        return [entry for _, entry in entries]


def by_path(name: str, tree: Any, types: tuple[type, ...], expected: str) -> Any:
    """A tree as a `ByPath`; functions, None and a `ByPath` are returned unchanged.

    Args:
      name: of the argument, for the error.
      tree: a function, or a pytree.
      types: of its leaves.
      expected: what they are, for the error.

    Raises:
      TypeError: a leaf is of another type.
    """
    # A module of bools may be callable too, but is not a leaf.
    is_function = callable(tree) and jax.tree_util.all_leaves([tree])
    if tree is None or is_function or isinstance(tree, ByPath):
        return tree
    entries = named_leaves(tree, types)
    for _, entry in entries:
        if not isinstance(entry, types):
            raise TypeError(
                f"{name} must be a tree of {expected}, got the leaf {entry!r}"
            )
    return ByPath(tuple(entries))


def check_shapes(name: str, tree: Params, params: Params) -> None:
    """Raises a ValueError unless each leaf has the shape of its parameter."""
    leaves = zip(named_leaves(tree), named_leaves(params), strict=True)
    for (path, own), (_, leaf) in leaves:
        if jnp.shape(own) != jnp.shape(leaf):
            raise ValueError(
                f"{name}[{path!r}] must have the shape of its parameter "
                f"{jnp.shape(leaf)}, got {jnp.shape(own)}"
            )


def check_masks(name: str, masks: Params, params: Params) -> None:
    """Raises unless there is a mask for each parameter, bool and of its shape.

    Raises:
      TypeError: a mask is not bool.
      ValueError: the paths or shapes are others than those of the parameters.
    """
    own = named_leaves(masks)
    if [path for path, _ in own] != [path for path, _ in named_leaves(params)]:
        check_structure(name, masks, params)
    check_shapes(name, masks, params)
    for path, mask in own:
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(
                f"{name}[{path!r}] must be bool, got {jnp.result_type(mask).name}"
            )
