"""A pull towards the compressed parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cram_jax.keys import check_key, key_data, split_key_data
from cram_jax.projector import (
    Params,
    Projector,
    apply_masks,
    check_only_masks,
    check_projector,
    widened,
)
from cram_jax.transforms import check_updates
from cram_jax.validation import (
    check_flag,
    check_integer,
    check_state,
    check_strength,
)


class PulledState(NamedTuple):
    """State of `pulled`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      key: uint32 array, the data of the PRNG key for the projector's draws.
      projector_state: the projector's own state.
      target: the compressed parameters :math:`z`, like the parameters; ``()`` if they
        are computed at every step without a dual variable.
      dual: the dual variable :math:`v`, like the parameters; ``()`` without one.
      squares: running mean :math:`s` of the squared updates, like the parameters but
        in at least float32; ``()`` if it is not kept.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, over tuple.count
    key: jax.Array
    projector_state: Any
    target: Params
    dual: Params
    squares: Params


def pulled(
    projector: Projector,
    strength: float | optax.Schedule,
    *,
    every: int = 1,
    dual: bool = False,
    importance: float | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a term to the updates that pulls parameters towards their compression.

    With parameters :math:`\theta`, compression :math:`C`, strength :math:`\lambda`:

    .. math:: u \leftarrow u + \lambda (\theta - z + v)

    and at every ``every``-th step, before that,

    .. math:: z \leftarrow C(\theta + v), \qquad v \leftarrow v + \theta - z

    where :math:`v` stays zero without ``dual``. Initially :math:`z = C(\theta)`.
    That is the gradient of :math:`\lambda / 2 \|\theta - z + v\|^2`, so training ends
    near compressed parameters; `compress` then goes the rest of the way.

    Place it after the update rule, if any (`sam`, `cram`), and before weight decay and
    the optimiser:

    - ADMM: ``chain(pulled(top_k(0.95), 1e-3, every=32, dual=True), sgd(...))``;
    - SAFE: the same behind ``sam(loss_fn, 0.1)``;
    - the decay of SR-STE, :math:`\lambda (1 - M) \odot \theta`:
      ``pulled(n_m(2, 4), 2e-4)``;
    - proximal quantisation: ``pulled(fake_quant(4), ...)``;
    - ELSA: ADMM with ``importance=0.999`` and Adam behind it.

    With ``importance``, a decay :math:`\beta`, the target keeps of :math:`\theta + v`
    what the projector keeps of :math:`\sqrt{s} (\theta + v)`, with

    .. math:: s \leftarrow \beta s + (1 - \beta) u^2

    after every update. That is Adam's second moment if Adam comes next and has this
    decay: the loss of removing a weight is estimated by :math:`s \theta^2`.

    Only leaves that the projector may change are pulled, see `Projector.changes`. Under
    `optax.inject_hyperparams`, all arguments but ``strength`` are static:
    ``static_args=("projector", "every", "importance", "key")``.

    Args:
      projector: the compression :math:`C`.
      strength: :math:`\lambda`, at least 0, or a schedule of the step count.
      every: steps between renewals of :math:`z` and :math:`v`.
      dual: whether there is a dual variable, as in the method of multipliers.
      importance: the decay of the mean of squared updates that weights are compared
        by, 0 <= importance < 1; None: by their magnitude. Only with ``every`` above 1
        or ``dual``, and a projector that does nothing but set weights to zero.
      key: seed or PRNG key, for projectors that draw.

    Returns:
      A gradient transformation with the state `PulledState`. ``update`` needs
      ``params``.

    Raises:
      TypeError: an argument is of a wrong type.
      ValueError: ``strength`` is negative or not finite, ``every`` below 1, or
        ``importance`` out of range, without a stored target or with a projector that
        changes what it keeps; at ``update``,
        ``params`` is None, or ``updates`` has a different structure.

    Example:
      >>> params = [jnp.array([[1.0, -4.0]])]
      >>> optimizer = pulled(top_k(0.5), 0.1)
      >>> zero = [jnp.zeros((1, 2))]
      >>> optimizer.update(zero, optimizer.init(params), params)[0]
      [Array([[0.1, 0. ]], dtype=float32)]

    References:
      Lee et al., SAFE, ICML 2025, algorithm 1, arXiv 2506.06866; Zhou et al., SR-STE,
      ICLR 2021, equation 6, arXiv 2102.04010; Lee et al., ELSA, ICLR 2026, arXiv
      2510.01650.
    """
    check_projector("projector", projector)
    check_integer("every", every, 1)
    check_flag("dual", dual)
    check_key(key)
    check_strength("strength", strength)
    stores = every > 1 or dual
    if importance is not None:
        check_only_masks("projector", projector, "set importance=None")
        kinds = float | int | np.number
        if isinstance(importance, bool) or not isinstance(importance, kinds):
            raise TypeError(
                f"importance must be a number from 0 to below 1, or None, got "
                f"{importance!r}"
            )
        if not 0 <= importance < 1:
            raise ValueError(f"importance must be from 0 to below 1, got {importance}")
        if not stores:
            raise ValueError(
                f"importance needs a stored target: every above 1 or dual=True, got "
                f"every={every} and dual={dual}"
            )

    def init(params: Params) -> PulledState:
        state, draw = split_key_data(key_data(key), key)
        projector_state = projector.init(params)
        target: Params = ()
        if stores and jax.tree.leaves(params):
            (target, _), projector_state = projector.project(
                params, projector_state, draw
            )
            # Copies, because a training step may donate its state.
            target = jax.tree.map(jnp.copy, target)
        elif stores:  # the placeholder of optax.tree.map_params
            target = params
        return PulledState(
            jnp.zeros([], jnp.int32),
            state,
            projector_state,
            target,
            jax.tree.map(jnp.zeros_like, params) if dual else (),
            # A narrow type would lose the share 1 - importance of a square.
            ()
            if importance is None
            else jax.tree.map(lambda leaf: jnp.zeros_like(widened(leaf)), params),
        )

    def project(
        params: Params, state: PulledState, draw: jax.Array
    ) -> tuple[Params, Any]:
        compared = params
        if importance is not None:
            compared = jax.tree.map(_weighed, params, state.squares)
        (target, masks), projector_state = projector.project(
            compared, state.projector_state, draw
        )
        if importance is not None:
            target = apply_masks(masks, params)
        return target, projector_state

    def renew(
        params: Params, state: PulledState, draw: jax.Array
    ) -> tuple[Params, Params, Any]:
        shifted = optax.tree.add(params, state.dual) if dual else params
        target, projector_state = project(shifted, state, draw)
        rest = optax.tree.sub(shifted, target) if dual else ()
        return target, rest, projector_state

    def keep(
        params: Params, state: PulledState, draw: jax.Array
    ) -> tuple[Params, Params, Any]:
        del params, draw
        return state.target, state.dual, state.projector_state

    def update(
        updates: Params,
        state: PulledState,
        /,
        params: Params | None = None,
        **extra_args: object,
    ) -> tuple[Params, PulledState]:
        del extra_args
        if params is None:
            raise ValueError("pulled needs params in update(...), got None")
        check_updates(updates, params)
        check_state(state, PulledState)
        key_after, draw = split_key_data(state.key, key)
        if stores:
            # At the start of the next step, which is the same as at the end of this
            # one, when only the caller has the new parameters.
            is_due = (state.count % every == 0) & (state.count > 0)
            target, rest, projector_state = jax.lax.cond(
                is_due, renew, keep, params, state, draw
            )
        else:
            target, projector_state = project(params, state, draw)
            rest = ()
        force = strength(state.count) if callable(strength) else strength
        offset = optax.tree.sub(params, target)
        if dual:
            offset = optax.tree.add(offset, rest)
        leaves = zip(
            jax.tree.leaves(updates),
            jax.tree.leaves(offset),
            projector.changes(params),
            strict=True,
        )
        structure: Any = jax.tree.structure(updates)
        with jax.numpy_dtype_promotion("standard"):
            pulled_updates = structure.unflatten(
                (u + force * o).astype(jnp.result_type(u)) if is_changed else u
                for u, o, is_changed in leaves
            )
        squares: Params = ()
        if importance is not None:
            seen = optax.tree.cast_like(pulled_updates, state.squares)
            squares = optax.tree.update_moment(seen, state.squares, importance, 2)
        return pulled_updates, PulledState(
            optax.safe_increment(state.count),
            key_after,
            projector_state,
            target if stores else (),
            rest,
            squares,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _weighed(param: jax.Array, square: jax.Array) -> jax.Array:
    # Not in a narrow dtype, where most products would be 0.
    return param.astype(square.dtype) * jnp.sqrt(square)
