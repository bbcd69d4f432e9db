"""The contract between what compresses parameters and what trains or deploys them.

A projector is to compression what a gradient transformation is to updates: a small
pure value. Training, one-shot compression and export use the same one, so that what
is trained is what is deployed.
"""

import abc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeAlias

import jax
import jax.numpy as jnp

from cram_jax.validation import check_function
from cram_jax.values import Value

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


class Projector(Value, abc.ABC):
    """A value that compresses parameters.

    Projectors are frozen dataclasses: equal ones do the same, they can be static
    arguments of `jax.jit`, and print as the call that made them. To write one of your
    own see `stateless`, or inherit from this class.
    """

    def init(self, params: Params) -> Any:
        """The state before the first use: by default none.

        Traces `project` on abstract values, so that its errors are raised here.

        Args:
          params: a pytree of arrays; only shapes and dtypes matter.

        Returns:
          A pytree of arrays, often ``()``.

        Raises:
          TypeError: a leaf is no array; or `project` does not return a projection
            and a state.
          ValueError: `project` would change a structure, shape or dtype.
        """
        check_arrays("params", params)
        # optax.tree.map_params calls this with a tree without leaves.
        if jax.tree.leaves(params):
            key = jax.eval_shape(lambda: jax.random.key(0))
            result = jax.eval_shape(
                lambda params, key: self.project(params, (), key), params, key
            )
            if isinstance(result, Projection) or not isinstance(result, tuple):
                raise TypeError(
                    f"projector {self!r} must return (Projection(params, masks), "
                    f"state), got {type(result).__name__}"
                )
            projection, _ = result
            _check_projection(projection, params, repr(self))
        return ()

    @abc.abstractmethod
    def project(
        self, params: Params, state: Any, key: jax.Array | None
    ) -> tuple[Projection, Any]:
        """Compresses parameters.

        Args:
          params: a pytree of arrays.
          state: from `init` or the last use.
          key: a PRNG key, or None if the caller has none to give.

        Returns:
          The projection, and the state for the next use.
        """

    def notes(self, params: Params) -> list[str]:
        """Notes for a report on each leaf: why it stays dense, or what was assumed.

        Args:
          params: a pytree of arrays.

        Returns:
          A note for each leaf, in the order of ``jax.tree.leaves``; by default empty.
        """
        return [""] * len(jax.tree.leaves(params))

    def changes(self, params: Params) -> list[bool]:
        """Whether each leaf may change, in the order of ``jax.tree.leaves``.

        By default all may. `pulled` leaves the others alone.

        Args:
          params: a pytree of arrays.

        Returns:
          One bool for each leaf.
        """
        return [True] * len(jax.tree.leaves(params))

    @property
    def is_scheduled(self) -> bool:
        """Whether a use depends on how many there were before; see `scheduled`."""
        return False

    @property
    def only_masks(self) -> bool:
        """Whether the result is the parameters where the masks are True, else zero.

        True by default. `cached`, `renew_by` and ``pulled(importance=)`` use nothing
        but the masks, and refuse projectors of which it is False.
        """
        return True

    @property
    def shared(self) -> Hashable:
        """Equal for projectors that can share a program; None if none can.

        `one_of` asks for it: a program for each of many sparsities would take longer to
        compile, and more memory.
        """
        return None

    def drawn(self, members: Sequence[Any], index: jax.Array) -> Self:
        """Does what ``members[index]`` does, for a traced index and equal `shared`.

        Args:
          members: projectors, this one among them.
          index: an integer scalar.

        Returns:
          A projector; by default itself, as equal members do the same.
        """
        del members, index
        return self


def check_arrays(name: str, tree: Any) -> None:
    """Raises a TypeError unless all leaves are arrays, abstract ones, or floats."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, float | int):
            raise TypeError(
                f"{name}[{leaf_path(path)!r}] must be an array, got {leaf!r}; pass "
                f"only the arrays, such as equinox.filter(model, equinox.is_array)"
            )


def check_projector(name: str, value: Any) -> None:
    """Raises a TypeError unless the value is a projector."""
    if not isinstance(value, Projector):
        raise TypeError(f"{name} must be a Projector, got {value!r}")


def check_only_masks(name: str, projector: Projector, instead: str) -> None:
    """Raises a ValueError unless the projector does no more than set entries to zero.

    Args:
      name: of the argument, for the error.
      projector: the projector.
      instead: what to do with one that does more, for the error.
    """
    if not projector.only_masks:
        raise ValueError(
            f"{name} must only set entries to zero, as top_k does, because nothing but "
            f"its masks is used, got {projector!r}, which changes what it keeps; "
            f"{instead}"
        )


@dataclass(frozen=True, repr=False)
class Stateless(Projector):
    """See `stateless`."""

    function: Callable[[Params, jax.Array | None], Projection]
    label: str

    def __repr__(self) -> str:
        return self.label

    def project(
        self, params: Params, state: Any, key: jax.Array | None
    ) -> tuple[Projection, Any]:
        """The function's projection."""
        return self.function(params, key), state


def stateless(
    function: Callable[[Params, jax.Array | None], Projection], label: str
) -> Projector:
    """Makes a projector from a function without state.

    The function is traced once, on abstract values, when the projector first sees the
    parameters, so that its errors are raised at ``init``.

    Args:
      function: ``(params, key) -> Projection``, pure and jittable.
      label: the projector's name in tables and errors.

    Returns:
      A projector with an empty state. It equals others with the same function and
      label.

    Raises:
      TypeError: ``function`` is not a function.
      ValueError: at ``init``, if the function changes a structure, shape or dtype.

    Example:
      A projector of your own, which keeps the weights above a threshold:

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
    check_function("function", function)
    return Stateless(function, label)


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


def widened(leaf: jax.Array) -> jax.Array:
    """In float32, or wider if the leaf is."""
    # Not promote_types, which knows neither float8 nor strict promotion.
    is_wide = jnp.finfo(leaf.dtype).bits >= 32
    return leaf if is_wide else leaf.astype(jnp.float32)


def check_structure(name: str, tree: Any, params: Params) -> None:
    """Raises a ValueError that names the tree unless it is structured like params."""
    structures: list[Any] = [jax.tree.structure(tree), jax.tree.structure(params)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} must have the structure of params {structures[1]}, "
            f"got {structures[0]}"
        )


def leaf_path(path: tuple[Any, ...]) -> str:
    """The path of a leaf as users write it, such as ``"encoder/dense/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
