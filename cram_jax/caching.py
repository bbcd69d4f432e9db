"""Masks that are kept for several steps (appendix C.6)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.projector import Params, Projection, Projector, apply_masks


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


def cached(projector: Projector, *, every: int) -> Projector:
    """Computes masks at every ``every``-th use, and applies the last ones in between.

    Saves most of a projection, which itself is small beside a gradient: measure before
    you use it. As a member of `one_of` it counts its own uses and keeps its own masks.

    Args:
      projector: one that only sets entries to zero, such as `top_k` or `n_m`. To
        quantise too, ``compose(cached(top_k(0.9), every=20), fake_quant(4))``.
      every: uses for which masks serve, at least 1.

    Returns:
      A projector with the state `CachedState`.

    Raises:
      TypeError: the projector is not a projector, or ``every`` not an integer.
      ValueError: ``every`` is below 1.

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
    if not isinstance(projector, Projector):
        raise TypeError(f"projector must be a Projector, got {projector!r}")
    if isinstance(every, bool) or not isinstance(every, int | np.integer):
        raise TypeError(f"every must be an integer, got {every!r}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")

    def init(params: Params) -> CachedState:
        nothing = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=bool), params)
        return CachedState(
            jnp.zeros([], jnp.int32), _pack(nothing), projector.init(params)
        )

    def project(
        params: Params, state: CachedState, key: jax.Array | None
    ) -> tuple[Projection, CachedState]:
        def refresh() -> tuple[Params, Any]:
            projection, inner = projector.project(params, state.inner, key)
            return _pack(projection.masks), inner

        def reuse() -> tuple[Params, Any]:
            return state.bits, state.inner

        bits, inner = jax.lax.cond(state.uses % every == 0, refresh, reuse)
        masks = _unpack(bits, params)
        projection = Projection(apply_masks(masks, params), masks)
        return projection, CachedState(state.uses + 1, bits, inner)

    return Projector(init, project, f"cached({projector.label}, every={every})")


def _pack(masks: Params) -> Params:
    return jax.tree.map(lambda mask: jnp.packbits(jnp.atleast_1d(mask), axis=-1), masks)


def _unpack(bits: Params, params: Params) -> Params:
    def unpack(packed: jax.Array, leaf: jax.Array) -> jax.Array:
        last = leaf.shape[-1] if leaf.ndim else 1
        entries = jnp.unpackbits(packed, axis=-1, count=last)
        return entries.reshape(leaf.shape).astype(bool)

    return jax.tree.map(unpack, bits, params)
