"""Projectors made of projectors."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.projector import (
    Family,
    Params,
    Projection,
    Projector,
    apply_masks,
    stateless,
)


def identity() -> Projector:
    """Leaves the parameters as they are, with masks that are all True.

    As a member of `one_of` it is a step without compression; in `cram` with
    ``normalize=True`` it makes SAM.

    Returns:
      A projector.

    Example:
      >>> compress([jnp.array([1.0, 2.0])], identity()).masks
      [Array([ True,  True], dtype=bool)]
    """

    def project(params: Params, key: jax.Array | None) -> Projection:
        del key
        masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
        return Projection(params, masks)

    return stateless(project, "identity()")


def one_of(
    *projectors: Projector, probabilities: Sequence[float] | None = None
) -> Projector:
    """Draws one of several projectors at every use: the paper's Multi (Algorithm 1).

    Args:
      *projectors: what to draw from, at least one.
      probabilities: one a projector, adding up to 1; by default all alike.

    Returns:
      A projector. Its state holds the states of all its members; a use changes that of
      the member drawn.

    Raises:
      ValueError: no projector, or probabilities that are not one a projector, negative,
        or do not add up to 1; at use, if there is no key to draw with.
      TypeError: a member is not a projector.

    Example:
      >>> multi = one_of(top_k(0.5), top_k(0.75))
      >>> multi.label
      'one_of(top_k(0.5), top_k(0.75))'
      >>> params = [jnp.array([[1.0, 2.0, 3.0, 4.0]])]
      >>> compress(params, multi, key=jax.random.key(0)).params
      [Array([[0., 0., 0., 4.]], dtype=float32)]

    Reference: Peste et al., CrAM, ICLR 2023, Algorithm 1, arXiv 2207.14200.
    """
    _check_members("one_of", projectors)
    weights = _check_probabilities(probabilities, len(projectors))
    label = f"one_of({', '.join(member.label for member in projectors)})"
    family, members = _common_family(projectors)

    def init(params: Params) -> tuple[Any, ...]:
        return tuple(member.init(params) for member in projectors)

    def use(
        index: int, params: Params, states: tuple[Any, ...], key: jax.Array
    ) -> tuple[Projection, tuple[Any, ...]]:
        projection, state = projectors[index].project(params, states[index], key)
        return projection, (*states[:index], state, *states[index + 1 :])

    def project(
        params: Params, state: tuple[Any, ...], key: jax.Array | None
    ) -> tuple[Projection, tuple[Any, ...]]:
        if key is None:
            raise ValueError(f"{label} draws at random: key must be given, got None")
        draw, inner = jax.random.split(key)
        index = jax.random.choice(draw, len(projectors), p=weights)
        if family is not None:
            return family.project(params, members, index), state
        branches = [partial(use, i) for i in range(len(projectors))]
        return jax.lax.switch(index, branches, params, state, inner)

    return Projector(init, project, label)


def _common_family(
    projectors: Sequence[Projector],
) -> tuple[Family | None, tuple[Any, ...]]:
    """The family that all projectors are of, if there is one, and its members."""
    families = [p.family for p in projectors if p.family is not None]
    if len(families) < len(projectors) or len({f.name for f in families}) > 1:
        return None, ()
    return families[0], tuple(family.member for family in families)


def compose(*projectors: Projector) -> Projector:
    """Applies projectors one after the other, such as pruning and then quantising.

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
    label = f"compose({', '.join(member.label for member in projectors)})"

    def init(params: Params) -> tuple[Any, ...]:
        return tuple(member.init(params) for member in projectors)

    def project(
        params: Params, state: tuple[Any, ...], key: jax.Array | None
    ) -> tuple[Projection, tuple[Any, ...]]:
        keys = (
            [None] * len(projectors)
            if key is None
            else jax.random.split(key, len(projectors))
        )
        masks = None
        states = []
        for member, member_state, member_key in zip(
            projectors, state, keys, strict=True
        ):
            (params, kept), member_state = member.project(
                params, member_state, member_key
            )
            masks = (
                kept if masks is None else jax.tree.map(jnp.logical_and, masks, kept)
            )
            params = apply_masks(masks, params)
            states.append(member_state)
        return Projection(params, masks), tuple(states)

    return Projector(init, project, label)


def _check_members(name: str, projectors: tuple[Projector, ...]) -> None:
    if not projectors:
        raise ValueError(f"{name} needs at least one projector, got none")
    for index, member in enumerate(projectors):
        if not isinstance(member, Projector):
            raise TypeError(
                f"projectors[{index}] of {name} must be a Projector, got {member!r}"
            )


def _check_probabilities(
    probabilities: Sequence[float] | None, count: int
) -> jax.Array | None:
    if probabilities is None:
        return None
    weights = np.asarray(probabilities)
    if (
        weights.shape != (count,)
        or not np.issubdtype(weights.dtype, np.number)
        or (weights < 0).any()
        or abs(weights.sum() - 1) > 1e-6
    ):
        raise ValueError(
            f"probabilities must be {count} numbers >= 0 that add up to 1, one a "
            f"projector, got {probabilities!r}"
        )
    return jnp.asarray(weights, dtype=jnp.float32)
