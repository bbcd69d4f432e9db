"""Masks that are kept for several steps (appendix C.6)."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cram_jax.projector import (
    Params,
    Projection,
    Projector,
    apply_masks,
    check_only_masks,
    check_projector,
)
from cram_jax.reshaping import pad_axis, placed, split_axis
from cram_jax.validation import check_integer, check_state


class CachedState(NamedTuple):
    """State of `cached`.

    Attributes:
      uses: int32 scalar, how often the projector was used.
      bits: the masks, eight entries of the last axis in a uint8: 1/32 of float32
        parameters.
      inner: state of the projector that makes the masks.
    """

    uses: jax.Array
    bits: Params
    inner: Any


def cached(projector: Projector, *, every: int) -> "Cached":
    """Recomputes masks at every ``every``-th use, and reuses them in between.

    Saves most of the cost of a projection, which is itself small compared with a
    gradient: measure before you use it. As a member of `one_of` it counts its own uses
    and keeps its own masks.

    Args:
      projector: one that only sets entries to zero, such as `top_k` or `n_m`. To
        quantise too, ``compose(cached(top_k(0.9), every=20), fake_quant(4))``.
      every: for how many uses masks are kept, at least 1.

    Returns:
      A projector with the state `CachedState`.

    Raises:
      TypeError: the projector is not a projector, or ``every`` not an integer.
      ValueError: ``every`` is below 1, or the projector also changes what it keeps.

    Example:
      >>> projector = cached(top_k(0.5), every=2)
      >>> params = [jnp.array([[1.0, 2.0]])]
      >>> state = projector.init(params)
      >>> (pruned, _), state = projector.project(params, state, None)
      >>> (again, _), state = projector.project([jnp.array([[4.0, 3.0]])], state, None)
      >>> pruned, again
      ([Array([[0., 2.]], dtype=float32)], [Array([[0., 3.]], dtype=float32)])

    Reference: Peste et al., CrAM, ICLR 2023, appendix C.6, arXiv 2207.14200.
    """
    check_projector("projector", projector)
    check_only_masks(
        "projector",
        projector,
        "cache the masks, then round: compose(cached(top_k(0.9), every=20), "
        "fake_quant(4))",
    )
    check_integer("every", every, 1)
    return Cached(projector, every=int(every))


@dataclass(frozen=True, repr=False)
class Cached(Projector):
    """See `cached`."""

    projector: Projector
    _: KW_ONLY
    every: int

    @property
    def is_scheduled(self) -> bool:
        """Whether the projector is."""
        return self.projector.is_scheduled

    def changes(self, params: Params) -> list[bool]:
        """The leaves that the inner projector may change."""
        return self.projector.changes(params)

    def notes(self, params: Params) -> list[str]:
        """The notes of the inner projector."""
        return self.projector.notes(params)

    def init(self, params: Params) -> CachedState:
        """No uses yet, and empty masks."""
        bits = jax.tree.map(lambda leaf: _pack(jnp.zeros_like(leaf, bool)), params)
        if not jax.tree.leaves(params):
            # The placeholder of optax.tree.map_params: bits are not shaped like
            # parameters.
            bits = jnp.zeros([], jnp.uint8)
        return CachedState(jnp.zeros([], jnp.int32), bits, self.projector.init(params))

    def project(
        self, params: Params, state: CachedState, key: jax.Array | None
    ) -> tuple[Projection, CachedState]:
        """Recomputes the masks, or applies the last ones."""

        def refresh(
            params: Params, state: CachedState, key: jax.Array | None
        ) -> tuple[Params, Any]:
            projection, inner = self.projector.project(params, state.inner, key)
            return jax.tree.map(_pack, projection.masks), inner

        def reuse(
            params: Params, state: CachedState, key: jax.Array | None
        ) -> tuple[Params, Any]:
            del params, key
            return state.bits, state.inner

        check_state(state, CachedState, self)
        is_due = state.uses % self.every == 0
        if isinstance(is_due, jax.core.Tracer):
            # Passed in rather than captured, as captured arrays lose their sharding.
            bits, inner = jax.lax.cond(is_due, refresh, reuse, params, state, key)
        else:  # outside of jit, where cond would compile anew each time
            bits, inner = (refresh if is_due else reuse)(params, state, key)
        masks = jax.tree.map(_unpack, bits, params)
        projection = Projection(apply_masks(masks, params), masks)
        return projection, CachedState(state.uses + 1, bits, inner)


def _pack(mask: jax.Array) -> jax.Array:
    mask = jnp.atleast_1d(mask)
    mask = pad_axis(mask, mask.ndim - 1, 8)
    groups = split_axis(mask, mask.ndim - 1, 8)
    return jnp.sum(jnp.where(groups, _values(groups), 0), axis=-1, dtype=jnp.uint8)


def _unpack(bits: jax.Array, leaf: jax.Array) -> jax.Array:
    like = jnp.atleast_1d(leaf)
    groups = bits[..., None] & _values(bits[..., None])
    entries = jax.lax.reshape(groups != 0, (*bits.shape[:-1], 8 * bits.shape[-1]))
    mask = entries[..., : like.shape[-1]].reshape(leaf.shape)
    return placed(mask, leaf)


def _values(groups: jax.Array) -> jax.Array:
    """The values of the bits of a byte, along a last axis."""
    return (128 >> jnp.arange(8)).astype(jnp.uint8).reshape(*[1] * (groups.ndim - 1), 8)
