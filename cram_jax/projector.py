"""The contract between what compresses parameters and what trains or deploys them.

A projector is to compression what a gradient transformation is to updates: a small
pure value. Training, one-shot compression and export use the same one, so that what
is trained is what is deployed.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Params: TypeAlias = Any
"""A pytree of floating-point arrays."""


class Projection(NamedTuple):
    """Compressed parameters, and which of their entries were kept.

    Attributes:
      params: structure, shapes and dtypes of the parameters that were projected.
      masks: the same structure and shapes, bool; True where an entry was kept. All True
        for a leaf that nothing was removed from.
    """

    params: Params
    masks: Params


class Family(NamedTuple):
    """Projectors that differ in a number alone, so that one program can serve them all.

    `one_of` asks for it: a program for each of many sparsities would take longer to
    compile, and more memory.

    Attributes:
      name: equal for all of them, and for no others.
      member: the number of this one.
      project: ``(params, members, index) -> Projection``, that of ``members[index]``;
        the index is traced.
    """

    name: Hashable
    member: Any
    project: Callable[[Params, Sequence[Any], jax.Array], Projection]


class Projector(NamedTuple):
    """A pair of pure functions that compress parameters, and a name for them.

    Attributes:
      init: ``params -> state``; the state is a pytree of arrays, often ``()``.
      project: ``(params, state, key) -> (Projection, state)``. ``key`` is a PRNG key,
        or None where the caller has none to give.
      label: names the projector in tables, errors and logs, such as ``"top_k(0.9)"``.
      family: for projectors without a state, what others it can share a program with.
    """

    init: Callable[[Params], Any]
    project: Callable[[Params, Any, jax.Array | None], tuple[Projection, Any]]
    label: str
    family: Family | None = None


def stateless(
    function: Callable[[Params, jax.Array | None], Projection], label: str
) -> Projector:
    """Makes a projector from a function that keeps nothing from call to call.

    The function is traced once, on abstract values, when the projector first sees the
    parameters, so that whatever it refuses is refused at ``init``.

    Args:
      function: ``(params, key) -> Projection``, pure and jittable.
      label: the projector's name in tables and errors.

    Returns:
      A projector whose state is empty.

    Raises:
      ValueError: at ``init``, if the function changes a structure, shape or dtype.

    Example:
      A projector of one's own, which keeps the weights above a threshold:

      >>> import jax, jax.numpy as jnp
      >>> from cram_jax import Projection, compress, stateless
      >>> def threshold(value):
      ...     def function(params, key):
      ...         masks = jax.tree.map(lambda leaf: jnp.abs(leaf) > value, params)
      ...         keep = lambda mask, leaf: jnp.where(mask, leaf, 0)
      ...         return Projection(jax.tree.map(keep, masks, params), masks)
      ...     return stateless(function, f"threshold({value})")
      >>> compress({"kernel": jnp.array([[0.1, -2.0]])}, threshold(0.5)).params
      {'kernel': Array([[ 0., -2.]], dtype=float32)}
    """

    def init(params: Params) -> tuple[()]:
        projection = jax.eval_shape(function, params, jax.random.key(0))
        _check_projection(projection, params, label)
        return ()

    def project(
        params: Params, state: tuple[()], key: jax.Array | None
    ) -> tuple[Projection, tuple[()]]:
        return function(params, key), state

    return Projector(init, project, label)


def _check_projection(projection: Any, params: Params, label: str) -> None:
    if not isinstance(projection, Projection):
        raise TypeError(
            f"projector {label} must return a Projection(params, masks), "
            f"got {type(projection).__name__}"
        )
    expected = jax.eval_shape(lambda tree: tree, params)
    for name, tree, dtype in (
        ("params", projection.params, None),
        ("masks", projection.masks, jnp.bool_),
    ):
        check_structure(f"{name} from projector {label}", tree, expected)
        for (path, leaf), wanted in zip(
            jax.tree.leaves_with_path(tree), jax.tree.leaves(expected), strict=True
        ):
            if (leaf.shape, leaf.dtype) != (wanted.shape, dtype or wanted.dtype):
                raise ValueError(
                    f"projector {label} must return {name} of shape {wanted.shape} and "
                    f"dtype {jnp.dtype(dtype or wanted.dtype).name} at "
                    f"{leaf_path(path)!r}, got {leaf.shape} and {leaf.dtype.name}"
                )


def apply_masks(masks: Params, tree: Params) -> Params:
    """The tree where the masks are True, else zero."""
    return jax.tree.map(
        lambda mask, leaf: jnp.where(mask, leaf, jnp.zeros_like(leaf)), masks, tree
    )


def safe_denominator(value: jax.Array) -> jax.Array:
    """The value, or 1 if it is 0, to divide by."""
    return jnp.where(value == 0, 1, value)


def check_structure(name: str, tree: Any, params: Params) -> None:
    """Raises a ValueError that names the tree unless it is structured like params."""
    structures: list[Any] = [jax.tree.structure(tree), jax.tree.structure(params)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} must have the structure of params {structures[1]}, "
            f"got {structures[0]}"
        )


def leaf_path(path: tuple[Any, ...]) -> str:
    """The place of a leaf as users write it, such as ``"encoder/dense/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
