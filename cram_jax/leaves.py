"""Which leaves a projector may touch."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from cram_jax.projector import Params, Projection, check_structure, leaf_path

Where: TypeAlias = Callable[[str, jax.Array], bool] | Any
"""``(path, leaf) -> bool``, or a pytree of bools with the parameters' structure."""


def prunable(params: Params, where: Where | None = None) -> list[bool]:
    """Says of each leaf, in the order of ``jax.tree.leaves``, whether it may be pruned.

    Args:
      params: a pytree of arrays.
      where: ``(path, leaf) -> bool``, or a tree of bools like ``params``. A path is the
        keys from the root, joined by "/": ``"encoder/dense/kernel"``; in an NNX State
        that was not made pure it ends in ``"/value"``. By default the leaves of two or
        more dimensions, which leaves out biases and normalisation.

    Returns:
      One bool a leaf, at least one of them True.

    Raises:
      TypeError: a chosen leaf is not of a floating dtype, or ``where`` is neither a
        function nor a tree of bools.
      ValueError: ``where`` chooses no leaf, or its structure is not that of the
        parameters.

    Example:
      >>> params = {"dense": {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))}}
      >>> prunable(params)
      [False, True]
      >>> prunable(params, lambda path, leaf: path.endswith("bias"))
      [True, False]
    """
    leaves = [
        (leaf_path(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)
    ]
    if where is None:
        chosen = [jnp.ndim(leaf) >= 2 for _, leaf in leaves]
    elif callable(where):
        chosen = [bool(where(path, leaf)) for path, leaf in leaves]
    else:
        chosen = _bools(where, params)
    if not any(chosen):
        raise ValueError(
            f"where={where!r} chooses no leaf to prune, expected at least one of "
            f"{[path for path, _ in leaves]}"
            + (" (by default those of two or more dimensions)" if where is None else "")
        )
    for (path, leaf), is_chosen in zip(leaves, chosen, strict=True):
        if is_chosen and not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params[{path!r}] has dtype {jnp.result_type(leaf).name}, expected a "
                f"floating dtype; exclude the leaf with `where`"
            )
    return chosen


def _bools(where: Any, params: Params) -> list[bool]:
    check_structure("where, if it is not a function,", where, params)
    chosen = jax.tree.leaves(where)
    for leaf in chosen:
        if not isinstance(leaf, bool):
            raise TypeError(f"where must be a tree of bools, got the leaf {leaf!r}")
    return chosen


def matching(pattern: str) -> Where:
    """Leaves of two or more dimensions whose path matches, for ``where``.

    Args:
      pattern: a regular expression, found anywhere in the path, as ``"^encoder/"``.

    Returns:
      A function ``(path, leaf) -> bool``.

    Raises:
      ValueError: the pattern is no regular expression.

    Example:
      >>> encoder_only = top_k(0.5, scope="layer", where=matching("^encoder/"))
    """
    expression = _compiled(pattern)

    def where(path: str, leaf: jax.Array) -> bool:
        return jnp.ndim(leaf) >= 2 and expression.search(path) is not None

    return where


def all_but(pattern: str) -> Where:
    """Leaves of two or more dimensions whose path does not match, for ``where``.

    Trees do not tell which layer is first or last: name them.

    Args:
      pattern: a regular expression, found anywhere in the path.

    Returns:
      A function ``(path, leaf) -> bool``.

    Raises:
      ValueError: the pattern is no regular expression.

    Example:
      >>> but_first_and_last = top_k(0.9, where=all_but("^(stem|head)/"))
    """
    expression = _compiled(pattern)

    def where(path: str, leaf: jax.Array) -> bool:
        return jnp.ndim(leaf) >= 2 and expression.search(path) is None

    return where


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"pattern must be a regular expression, got {pattern!r}: {error}"
        ) from error


def project_prunable(
    params: Params,
    where: Where | None,
    compress: Callable[[Sequence[jax.Array]], Sequence[tuple[jax.Array, jax.Array]]],
) -> Projection:
    """Compresses the prunable leaves together, and leaves the others as they are.

    Args:
      params: a pytree of arrays.
      where: see `prunable`.
      compress: from the prunable leaves to one ``(values, mask)`` each.

    Returns:
      The projection of the whole tree.
    """
    leaves = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    chosen = prunable(params, where)
    compressed = iter(
        compress([leaf for leaf, c in zip(leaves, chosen, strict=True) if c])
    )
    pairs = [
        next(compressed) if c else (leaf, jnp.ones_like(leaf, dtype=bool))
        for leaf, c in zip(leaves, chosen, strict=True)
    ]
    values, masks = zip(*pairs, strict=True)
    return Projection(structure.unflatten(values), structure.unflatten(masks))
