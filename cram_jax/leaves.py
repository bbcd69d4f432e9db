"""Which leaves a projector may touch."""

import abc
import itertools
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.axes import Axes, AxesLike, axes_of, check_pattern
from cram_jax.paths import ByPath, by_path, named_leaves
from cram_jax.projector import Params, Projection, Projector, check_arrays
from cram_jax.selection import MAGNITUDES, has_magnitudes
from cram_jax.values import Value

Where: TypeAlias = Callable[[str, jax.Array], bool] | Any
"""``(path, leaf) -> bool``, or a pytree of bools with the parameters' structure."""


class Leaf(NamedTuple):
    """A parameter with its path and its axes."""

    path: str
    value: Any
    axes: Axes


def prunable(
    params: Params, where: Where | None = None, axes: AxesLike | None = None
) -> list[bool]:
    """Says whether each leaf, in the order of ``jax.tree.leaves``, may be pruned.

    Args:
      params: a pytree of arrays.
      where: ``(path, leaf) -> bool``, or a tree of bools like ``params``. A path is the
        keys from the root, joined by "/": ``"encoder/dense/kernel"``, in an NNX State
        and in its pure tree alike. By default the leaves of two or more dimensions, not
        counting stacked layers, other than biases, norm scales and the like: see
        `axes_of`.
      axes: what is known of the axes, see `axes_of`.

    Returns:
      One bool for each leaf, at least one of them True.

    Raises:
      TypeError: a chosen leaf is not of a floating dtype, ``where`` is neither a
        function nor a tree of bools, or the function reads the weights.
      ValueError: ``where`` chooses no leaf, or its structure is not that of the
        parameters.

    Example:
      >>> params = {"dense": {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))}}
      >>> prunable(params)
      [False, True]
      >>> prunable(params, lambda path, leaf: path.endswith("bias"))
      [True, False]
    """
    return _choose(params, where, axes)[1]


def _choose(
    params: Params, where: Where | None, axes: AxesLike | None
) -> tuple[list[Leaf], list[bool]]:
    """The leaves, and whether each may be pruned; see `prunable`."""
    where = where_value(where)
    leaves = described(params, axes)
    chosen = [not reason for reason in reasons_against(params, leaves, where)]
    if not any(chosen):
        raise ValueError(
            f"where={where!r} chooses no leaf to prune, expected at least one of "
            f"{[leaf.path for leaf in leaves]}"
            + (" (by default those of two or more dimensions)" if where is None else "")
        )
    for leaf, is_chosen in zip(leaves, chosen, strict=True):
        dtype = jnp.result_type(leaf.value)
        if is_chosen and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params[{leaf.path!r}] has dtype {dtype}, expected a floating dtype; "
                f"exclude the leaf with `where`"
            )
        if is_chosen and not has_magnitudes(dtype):
            raise TypeError(
                f"params[{leaf.path!r}] has dtype {dtype}, expected {MAGNITUDES}; "
                f"exclude the leaf with `where`"
            )
    return leaves, chosen


def described(params: Params, axes: AxesLike | None) -> list[Leaf]:
    """Each leaf of the parameters with its path and axes."""
    check_arrays("params", params)
    named = named_leaves(params)
    return [
        Leaf(path, leaf, own)
        for (path, leaf), own in zip(named, axes_of(params, axes), strict=True)
    ]


def reasons_against(
    params: Params, leaves: Sequence[Leaf], where: Where | None
) -> list[str]:
    """Why each leaf may not be pruned; empty if it may."""
    if where is None or isinstance(where, PathFilter):
        return [
            _not_a_matrix(leaf)
            or ("" if where is None or where.accepts(leaf.path) else "not in `where`")
            for leaf in leaves
        ]
    if callable(where):
        chosen = [_answer(where, leaf) for leaf in leaves]
    else:
        chosen = where.like("where", params)
    return ["" if is_chosen else "not in `where`" for is_chosen in chosen]


def _answer(where: Callable[[str, jax.Array], bool], leaf: Leaf) -> bool:
    """Whether a function chooses a leaf."""
    with jax.ensure_compile_time_eval():
        answer = where(leaf.path, leaf.value)
    if isinstance(answer, jax.core.Tracer):
        raise TypeError(
            f"where must not read the weights, which are traced, but depends on those "
            f"of {leaf.path!r}; compute a tree of bools from them first, outside jit"
        )
    if np.ndim(answer):
        raise TypeError(
            f"where must return a bool, got an array of shape {np.shape(answer)} for "
            f"{leaf.path!r}"
        )
    return bool(answer)


def _not_a_matrix(leaf: Leaf) -> str:
    if leaf.axes.is_matrix:
        return ""
    layer = " in a layer" if leaf.axes.stack else ""
    if jnp.ndim(leaf.value) - len(leaf.axes.stack) < 2:
        return f"fewer than 2 dimensions{layer}"
    return "added or multiplied, not contracted"


def where_value(where: Where | None) -> Any:
    """A filter of leaves, as a value that compares and hashes."""
    if any(isinstance(leaf, str) for leaf in jax.tree.leaves(where)):
        raise TypeError(
            f"where must be a function of path and leaf or a tree of bools, got "
            f"{where!r}; for a regular expression, pass matching(...) or all_but(...)"
        )
    kinds = (bool, np.bool_, np.ndarray, jax.Array)
    value = by_path("where", where, kinds, "bools")
    if not isinstance(value, ByPath):
        return value
    return ByPath(tuple((path, _as_bool(entry)) for path, entry in value.entries))


def _as_bool(entry: Any) -> bool:
    if jnp.shape(entry) != () or jnp.result_type(entry) != jnp.bool_:
        raise TypeError(f"where must be a tree of bools, got the leaf {entry!r}")
    return bool(entry)


@dataclass(frozen=True, repr=False)
class PathFilter(Value, abc.ABC):
    """Chooses leaves of two or more dimensions by their paths."""

    pattern: str

    def __call__(self, path: str, leaf: jax.Array) -> bool:
        """Whether a leaf is chosen."""
        return jnp.ndim(leaf) >= 2 and self.accepts(path)

    @abc.abstractmethod
    def accepts(self, path: str) -> bool:
        """Whether to choose this path."""


class Matching(PathFilter):
    """See `matching`."""

    def accepts(self, path: str) -> bool:
        """Whether the pattern is found in the path."""
        return re.search(self.pattern, path) is not None


class AllBut(PathFilter):
    """See `all_but`."""

    def accepts(self, path: str) -> bool:
        """Whether the pattern is not found in the path."""
        return re.search(self.pattern, path) is None


def matching(pattern: str) -> Matching:
    """The leaves prunable by default whose path matches, for ``where``.

    Args:
      pattern: a regular expression, found anywhere in the path, such as
        ``"^encoder/"``.

    Returns:
      A function ``(path, leaf) -> bool``, a value that compares.

    Raises:
      ValueError: the pattern is no regular expression.

    Example:
      >>> encoder_only = top_k(0.5, scope="layer", where=matching("^encoder/"))
      >>> encoder_only == top_k(0.5, scope="layer", where=matching("^encoder/"))
      True
    """
    check_pattern(pattern)
    return Matching(pattern)


def all_but(pattern: str) -> AllBut:
    """The leaves prunable by default whose path does not match, for ``where``.

    A tree does not say which layer is first or last: name them.

    Args:
      pattern: a regular expression, found anywhere in the path.

    Returns:
      A function ``(path, leaf) -> bool``, a value that compares.

    Raises:
      ValueError: the pattern is no regular expression.

    Example:
      >>> but_first_and_last = top_k(0.9, where=all_but("^(stem|head)/"))
    """
    check_pattern(pattern)
    return AllBut(pattern)


def notes_of(
    params: Params,
    where: Where | None,
    axes: AxesLike | None,
    obstacle: Callable[[Leaf], str] = lambda leaf: "",
) -> list[str]:
    """Why leaves stay dense, and which axes were assumed for the others.

    Args:
      params: a pytree of arrays.
      where: which leaves are prunable.
      axes: what is known of their axes.
      obstacle: why a prunable leaf has to stay unchanged; empty if it may change.

    Returns:
      A note for each leaf; empty if there is nothing to say.
    """
    leaves = described(params, axes)
    return [
        reason
        or obstacle(leaf)
        or (f"assumed to be {leaf.axes}" if leaf.axes.assumed else "")
        for leaf, reason in zip(
            leaves, reasons_against(params, leaves, where), strict=True
        )
    ]


class LeafProjector(Projector):
    """Compresses the prunable leaves together, and leaves the others unchanged.

    Attributes:
      where: which leaves are prunable.
      axes: what is known of their axes.
    """

    where: Any
    axes: Any

    @property
    def shared(self) -> Hashable:
        """Itself."""
        return self

    @abc.abstractmethod
    def project_leaves(
        self, leaves: Sequence[Leaf]
    ) -> Sequence[tuple[jax.Array, jax.Array]]:
        """From leaves without an obstacle to a pair ``(values, mask)`` for each."""

    def obstacle(self, leaf: Leaf) -> str:
        """Why a prunable leaf has to stay unchanged; empty if it may change."""
        del leaf
        return ""

    def changes(self, params: Params) -> list[bool]:
        """The prunable leaves without an obstacle."""
        return self._fits(*_choose(params, self.where, self.axes))

    def notes(self, params: Params) -> list[str]:
        """Why leaves stay dense, and which axes were assumed for the others."""
        return notes_of(params, self.where, self.axes, self.obstacle)

    def project(
        self, params: Params, state: Any, key: jax.Array | None
    ) -> tuple[Projection, Any]:
        """Compresses the prunable leaves."""
        del key
        leaves, chosen = _choose(params, self.where, self.axes)
        # NumPy's float64 may not be a dtype that jax has enabled.
        leaves = [leaf._replace(value=jnp.asarray(leaf.value)) for leaf in leaves]
        fits = self._fits(leaves, chosen)
        if not any(fits):
            first, *others = itertools.compress(leaves, chosen)
            raise ValueError(
                f"{self!r} fits no prunable leaf: {first.path!r} of shape "
                f"{jnp.shape(first.value)}: {self.obstacle(first)}"
                + (f"; and {len(others)} more" if others else "")
            )
        projected = iter(self.project_leaves(list(itertools.compress(leaves, fits))))
        pairs = [
            next(projected)
            if is_fit
            else (leaf.value, jnp.ones_like(leaf.value, dtype=bool))
            for leaf, is_fit in zip(leaves, fits, strict=True)
        ]
        values, masks = zip(*pairs, strict=True)
        structure: Any = jax.tree.structure(params)
        return Projection(*map(structure.unflatten, (values, masks))), state

    def _fits(self, leaves: Sequence[Leaf], chosen: Sequence[bool]) -> list[bool]:
        return [
            is_chosen and not self.obstacle(leaf)
            for leaf, is_chosen in zip(leaves, chosen, strict=True)
        ]
