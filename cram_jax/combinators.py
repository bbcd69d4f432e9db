"""Projectors made of projectors."""

from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cram_jax.projector import (
    Params,
    Projection,
    Projector,
    apply_masks,
    check_projector,
)
from cram_jax.validation import raise_state


def identity() -> "Identity":
    """Leaves the parameters unchanged, with masks that are all True.

    As a member of `one_of` it is a step without compression; in `cram` with
    ``normalize=True`` it makes SAM.

    Returns:
      A projector.

    Example:
      >>> compress([jnp.array([1.0, 2.0])], identity()).masks
      [Array([ True,  True], dtype=bool)]
    """
    return Identity()


@dataclass(frozen=True, repr=False)
class Identity(Projector):
    """See `identity`."""

    @property
    def shared(self) -> Hashable:
        """Itself."""
        return self

    def changes(self, params: Params) -> list[bool]:
        """None."""
        return [False] * len(jax.tree.leaves(params))

    def project(
        self, params: Params, state: Any, key: jax.Array | None
    ) -> tuple[Projection, Any]:
        """The parameters."""
        del key
        masks = optax.tree.ones_like(params, dtype=bool)
        return Projection(params, masks), state


def one_of(
    *projectors: Projector, probabilities: Sequence[float] | None = None
) -> "OneOf":
    """Draws one of several projectors at each use: the paper's Multi (Algorithm 1).

    Members that differ only in their sparsity share one program.

    Args:
      *projectors: what to draw from, at least one.
      probabilities: one for each projector, adding up to 1; by default all equal.

    Returns:
      A projector. Its state holds the states of all its members; a use changes only
      that of the member drawn.

    Raises:
      ValueError: there is no projector; or probabilities are not one for each, are
        negative or do not add up to 1; at use, if there is no key to draw with.
      TypeError: a member is not a projector.

    Example:
      >>> multi = one_of(top_k(0.5), top_k(0.75))
      >>> multi
      one_of(top_k(0.5), top_k(0.75))
      >>> params = [jnp.array([[1.0, 2.0, 3.0, 4.0]])]
      >>> compress(params, multi, key=jax.random.key(0)).params
      [Array([[0., 0., 0., 4.]], dtype=float32)]

    Reference: Peste et al., CrAM, ICLR 2023, Algorithm 1, arXiv 2207.14200.
    """
    _check_members("one_of", projectors)
    return OneOf(
        projectors, probabilities=_probabilities_value(probabilities, len(projectors))
    )


@dataclass(frozen=True, repr=False)
class Combination(Projector):
    """Projectors, each with a state of its own."""

    projectors: tuple[Projector, ...] = field(metadata={"variadic": True})

    def init(self, params: Params) -> tuple[Any, ...]:
        """The states of the members."""
        return tuple(member.init(params) for member in self.projectors)

    def check_states(self, state: Any) -> None:
        """Raises a TypeError unless there is a state for each member."""
        count = len(self.projectors)
        if not isinstance(state, tuple | list) or len(state) != count:
            raise_state(state, f"a tuple of {count} states", self)

    @property
    def is_scheduled(self) -> bool:
        """Whether a member is."""
        return any(member.is_scheduled for member in self.projectors)

    @property
    def only_masks(self) -> bool:
        """Whether all members only set entries to zero."""
        return all(member.only_masks for member in self.projectors)

    def changes(self, params: Params) -> list[bool]:
        """The leaves that any member may change."""
        by_leaf = zip(
            *(member.changes(params) for member in self.projectors), strict=True
        )
        return [any(changes) for changes in by_leaf]

    def notes(self, params: Params) -> list[str]:
        """The notes of the members, each once."""
        by_leaf = zip(
            *(member.notes(params) for member in self.projectors), strict=True
        )
        return ["; ".join(dict.fromkeys(filter(None, notes))) for notes in by_leaf]


@dataclass(frozen=True, repr=False)
class OneOf(Combination):
    """See `one_of`."""

    _: KW_ONLY
    probabilities: tuple[float, ...] | None = None

    def project(
        self, params: Params, state: tuple[Any, ...], key: jax.Array | None
    ) -> tuple[Projection, tuple[Any, ...]]:
        """Draws a member and uses it."""
        self.check_states(state)
        if key is None:
            raise ValueError(f"{self!r} draws at random: key must be given, got None")
        draw, inner = jax.random.split(key)
        count = len(self.projectors)
        weights = self.probabilities
        index = jax.random.choice(
            draw,
            count,
            p=None if weights is None else jnp.asarray(weights, jnp.float32),
        )
        groups = self._groups()
        branches = [partial(self._use, group, index) for group in groups]
        if len(groups) == 1:
            return branches[0](params, state, inner)
        group_of = [
            next(i for i, group in enumerate(groups) if member in group)
            for member in range(count)
        ]
        branch = jnp.asarray(group_of)[index]
        if isinstance(branch, jax.core.Tracer):
            return jax.lax.switch(branch, branches, params, state, inner)
        # Outside of jit, where switch would compile anew each time.
        return branches[int(branch)](params, state, inner)

    def _groups(self) -> list[list[int]]:
        """The members that share a program."""
        groups: dict[Hashable, list[int]] = {}
        for index, member in enumerate(self.projectors):
            shared = member.shared
            groups.setdefault(index if shared is None else (shared,), []).append(index)
        return list(groups.values())

    def _use(
        self,
        group: list[int],
        index: jax.Array,
        params: Params,
        states: tuple[Any, ...],
        key: jax.Array,
    ) -> tuple[Projection, tuple[Any, ...]]:
        first = group[0]
        member = self.projectors[first]
        if len(group) > 1:
            place = np.zeros(len(self.projectors), int)
            place[group] = range(len(group))
            members = [self.projectors[i] for i in group]
            member = member.drawn(members, jnp.asarray(place)[index])
        projection, state = member.project(params, states[first], key)
        return projection, (*states[:first], state, *states[first + 1 :])


def compose(*projectors: Projector) -> "Compose":
    """Applies projectors in turn, such as pruning and then quantising.

    An entry is kept if every projector keeps it; what one sets to zero stays zero.

    Args:
      *projectors: at least one, in the order of use.

    Returns:
      A projector.

    Raises:
      ValueError: no projector.
      TypeError: a member is not a projector.

    Example:
      >>> small = compose(top_k(0.5), fake_quant(2))
      >>> compress([jnp.array([[1.0], [-4.0], [3.0], [2.0]])], small).params[0].ravel()
      Array([ 0., -4.,  4.,  0.], dtype=float32)
    """
    _check_members("compose", projectors)
    return Compose(projectors)


@dataclass(frozen=True, repr=False)
class Compose(Combination):
    """See `compose`."""

    @property
    def shared(self) -> Hashable:
        """What the members share, if all can be."""
        shared = tuple(member.shared for member in self.projectors)
        return None if None in shared else ("compose", shared)

    def drawn(self, members: Sequence["Compose"], index: jax.Array) -> "Compose":
        """Itself, with the members at ``index``, each chosen by itself."""
        columns = zip(*(member.projectors for member in members), strict=True)
        return Compose(tuple(column[0].drawn(column, index) for column in columns))

    def project(
        self, params: Params, state: tuple[Any, ...], key: jax.Array | None
    ) -> tuple[Projection, tuple[Any, ...]]:
        """Uses the members in turn."""
        self.check_states(state)
        count = len(self.projectors)
        keys = [None] * count if key is None else jax.random.split(key, count)
        masks = None
        states = []
        for member, own, draw in zip(self.projectors, state, keys, strict=True):
            (params, kept), own = member.project(params, own, draw)
            masks = (
                kept if masks is None else jax.tree.map(jnp.logical_and, masks, kept)
            )
            params = apply_masks(masks, params)
            states.append(own)
        return Projection(params, masks), tuple(states)


def _check_members(name: str, projectors: tuple[Projector, ...]) -> None:
    if not projectors:
        raise ValueError(f"{name} needs at least one projector, got none")
    for index, member in enumerate(projectors):
        check_projector(f"projectors[{index}] of {name}", member)


def _probabilities_value(
    probabilities: Sequence[float] | None, count: int
) -> tuple[float, ...] | None:
    if probabilities is None:
        return None
    weights = np.asarray(probabilities)
    if (
        weights.shape != (count,)
        or not np.issubdtype(weights.dtype, np.number)
        or (weights < 0).any()
        or not abs(weights.sum() - 1) <= 1e-6  # NaN, too
    ):
        raise ValueError(
            f"probabilities must be {count} numbers >= 0 that add up to 1, one a "
            f"projector, got {probabilities!r}"
        )
    return tuple(weights.tolist())
