"""Baselines that CrAM is compared with, as optax gradient transformations."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from cram_jax.combinators import identity
from cram_jax.gradients import AxisName, gradient_at_update
from cram_jax.keys import split_key_data
from cram_jax.projector import Params, Projector, apply_masks, safe_denominator
from cram_jax.transforms import (
    CramState,
    ascend,
    check_params,
    check_rule,
    cram,
    initial_state,
    next_state,
    norm,
)
from cram_jax.validation import check_flag, check_state


def sam(
    loss_fn: Callable[..., Any] | None,
    rho: float | optax.Schedule = 0.05,
    *,
    normalize: bool = True,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by that at an ascent step: sharpness-aware minimisation.

    .. math:: u = \nabla L(\theta + \rho \nabla L(\theta) / \|\nabla L(\theta)\|)

    Exactly `cram` with the projector `identity` and ``normalize=True``: a baseline with
    the same calling convention and cost. A zero gradient means no ascent.

    Args:
      loss_fn: the loss, or None if it arrives as ``value_fn``; see `cram`.
      rho: radius of the ascent step, or a schedule of the step count.
      normalize: whether to divide the gradient by its norm over all parameters.
      has_aux: whether the loss returns auxiliary data.
      axis_name: under `jax.pmap` or `jax.shard_map`, the axes to average over.

    Returns:
      A gradient transformation with the state `CramState`, whose ``compressed_loss`` is
      the loss after the ascent. ``update`` needs ``params``.

    Raises:
      TypeError: as `cram`.
      ValueError: as `cram`.

    Example:
      >>> loss_fn = lambda params: jnp.sum(params**2)
      >>> params = jnp.array([3.0, 4.0])
      >>> optimizer = sam(loss_fn, rho=0.5)
      >>> optimizer.update(jax.grad(loss_fn)(params), optimizer.init(params), params)[0]
      Array([6.6, 8.8], dtype=float32)

    Reference: Foret et al., Sharpness-Aware Minimization, ICLR 2021, arXiv 2010.01412.
    """
    return cram(
        loss_fn,
        identity(),
        rho,
        sparse_gradients=False,
        normalize=normalize,
        has_aux=has_aux,
        axis_name=axis_name,
    )


def compressed_sam(
    loss_fn: Callable[..., Any] | None,
    projector: Projector,
    rho: float | optax.Schedule = 0.05,
    *,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the ascent step at the compressed model: the paper's C-SAM (eq. 11).

    .. math::
        (\hat\theta, M) = C(\theta), \quad
        g = \nabla L(\hat\theta) \odot M, \quad
        (\tilde\theta, \tilde M) = C(\theta + \rho g / \|g\|), \quad
        u = \nabla L(\tilde\theta) \odot \tilde M

    A baseline with the calling convention of `cram`, whose notes on chains, losses,
    errors and state apply. It evaluates two gradients of its own and does not read the
    incoming ``updates``. Both projections of a step make the same random draws.

    Args:
      loss_fn: the loss, or None if it arrives as ``value_fn``; see `cram`.
      projector: the compression :math:`C`.
      rho: radius of the ascent step, or a schedule of the step count.
      has_aux: whether the loss returns auxiliary data.
      axis_name: under `jax.pmap` or `jax.shard_map`, the axes to average over.
      key: seed or PRNG key, for projectors that draw.

    Returns:
      A gradient transformation with the state `CramState`. ``update`` needs ``params``.

    Raises:
      TypeError: as `cram`.
      ValueError: as `cram`.

    Example:
      >>> loss_fn = lambda params: jnp.sum(params**2)
      >>> params = jnp.array([[3.0, 4.0]])
      >>> optimizer = compressed_sam(loss_fn, top_k(0.5), rho=0.5)
      >>> optimizer.update(jax.grad(loss_fn)(params), optimizer.init(params), params)[0]
      Array([[0., 9.]], dtype=float32)

    Reference: Peste et al., CrAM, ICLR 2023, equation 11, arXiv 2207.14200.
    """
    check_rule(projector, rho, key)
    check_flag("has_aux", has_aux)
    gradient_at = gradient_at_update(loss_fn, has_aux=has_aux, axis_name=axis_name)

    def init(params: Params) -> CramState:
        return initial_state(params, projector, key)

    def update(
        updates: Params,
        state: CramState,
        /,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, CramState]:
        del updates
        check_params(params)
        check_state(state, CramState)
        key_after, draw = split_key_data(state.key, key)
        radius = rho(state.count) if callable(rho) else rho

        (compressed, masks), _ = projector.project(params, state.projector_state, draw)
        ascent = apply_masks(masks, gradient_at(compressed, extra_args)[1])
        perturbed = ascend(params, radius / safe_denominator(norm(ascent)), ascent)
        (compressed, masks), projector_state = projector.project(
            perturbed, state.projector_state, draw
        )
        loss, gradient = gradient_at(compressed, extra_args)
        gradient = apply_masks(masks, gradient)
        return gradient, next_state(state, key_after, projector_state, loss)

    return optax.GradientTransformationExtraArgs(init, update)
