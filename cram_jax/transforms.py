"""Compression-aware update rules, as optax gradient transformations."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from cram_jax.ascent import (
    CramState,
    ascend,
    check_arguments,
    check_params,
    initial_state,
    next_state,
    norm,
)
from cram_jax.combinators import identity
from cram_jax.losses import AxisName, gradient_of
from cram_jax.projector import Params, Projector, apply_masks, safe_denominator


def cram(
    loss_fn: Callable[..., Any],
    projector: Projector,
    rho: float | optax.Schedule = 0.05,
    *,
    sparse_gradients: bool = True,
    normalize: bool = False,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the one at the perturbed and compressed parameters.

    With parameters :math:`\theta`, loss :math:`L`, compression :math:`C` (equation 2):

    .. math::
        (\hat\theta, M) = C(\theta + \rho \nabla L(\theta)), \qquad
        u = \nabla L(\hat\theta) \odot M

    The incoming ``updates`` are the dense gradient :math:`\nabla L(\theta)`, which the
    caller has anyway, so an update costs one more evaluation of the gradient. The
    projector touches its prunable leaves, the ascent every leaf.

    Place it first in an `optax.chain`: what follows sees an ordinary gradient.
    `optax.masked` and `optax.partition` around it would hide parameters from the loss:
    put them after it. Under `optax.inject_hyperparams` name ``loss_fn`` and
    ``projector`` in ``static_args``. Accumulate gradients inside ``loss_fn``:
    `optax.MultiSteps` would keep the compressed gradient of one micro-batch alone.

    A gradient that is not finite passes through as it is. `optax.apply_if_finite` looks
    at what comes in: put it behind `cram`, and it sees the compressed pass too.

    Args:
      loss_fn: ``loss_fn(params, ...) -> scalar``, or ``(scalar, aux)`` with
        ``has_aux``. Its further arguments are taken by name from those of ``update``.
        Give both passes the same batch and the same dropout key.
      projector: the compression :math:`C`.
      rho: radius of the ascent step, at least 0, or a schedule of the step count.
      sparse_gradients: whether to keep the gradient of kept weights alone (:math:`M`;
        section 3.3), or the whole gradient straight through.
      normalize: whether to divide the gradient by its norm over all parameters before
        the ascent (appendix A.1); a zero gradient then gives no ascent.
      has_aux: whether ``loss_fn`` returns auxiliary data; that of the compressed pass
        is dropped, so batch statistics come from the dense pass alone.
      axis_name: under `jax.pmap` or `jax.shard_map`, the axes to average over.
      key: seed or PRNG key, for projectors that draw.

    Returns:
      A gradient transformation with the state `CramState`. ``update`` needs ``params``.

    Raises:
      TypeError: ``loss_fn`` or ``projector`` is not one, a parameter is not of a
        floating dtype or is hidden by `optax.masked`, or ``update`` lacks an argument
        of ``loss_fn``.
      ValueError: ``rho`` is negative, or ``update`` gets no ``params``.

    Example:
      >>> def loss_fn(params, batch):
      ...     return jnp.sum((batch @ params["kernel"]) ** 2)
      >>> params = {"kernel": jnp.array([[2.0], [1.0]])}
      >>> batch = jnp.eye(2)
      >>> optimizer = cram(loss_fn, top_k(0.5), rho=0.1)
      >>> grads = jax.grad(loss_fn)(params, batch)
      >>> updates, state = optimizer.update(
      ...     grads, optimizer.init(params), params, batch=batch
      ... )
      >>> updates["kernel"].ravel(), state.compressed_loss
      (Array([4.8, 0. ], dtype=float32), Array(5.76, dtype=float32))

    Reference: Peste et al., CrAM, ICLR 2023, equation 2, arXiv 2207.14200.
    """
    check_arguments(
        projector,
        rho,
        sparse_gradients=sparse_gradients,
        normalize=normalize,
        has_aux=has_aux,
    )
    gradient_at = gradient_of(loss_fn, has_aux=has_aux, axis_name=axis_name)

    def init(params: Params) -> CramState:
        return initial_state(params, projector, key)

    def update(
        updates: Params,
        state: CramState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, CramState]:
        check_params(params)
        key, draw = jax.random.split(state.key)
        radius = rho(state.count) if callable(rho) else rho
        if normalize:
            radius = radius / safe_denominator(norm(updates))

        perturbed = ascend(params, radius, updates)
        (compressed, masks), projector_state = projector.project(
            perturbed, state.projector_state, draw
        )
        loss, gradient = gradient_at(compressed, extra_args)
        if sparse_gradients:
            gradient = apply_masks(masks, gradient)
        return gradient, next_state(state, key, projector_state, loss)

    return optax.GradientTransformationExtraArgs(init, update)


def cram_plus(
    loss_fn: Callable[..., Any],
    projector: Projector,
    rho: float | optax.Schedule = 0.05,
    *,
    sparse_gradients: bool = True,
    normalize: bool = False,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the compressed model's gradient to the dense one.

    With parameters :math:`\theta`, loss :math:`L`, compression :math:`C` (equation 4):

    .. math::
        (\hat\theta, M) = C(\theta + \rho \nabla L(\theta)), \qquad
        u = \nabla L(\theta) + \nabla L(\hat\theta) \odot M

    The dense model stays as accurate as without, and its compressions come close. The
    two gradients are added, not averaged, so a learning rate tuned for plain training
    may want to be a little smaller.

    Exactly the incoming ``updates`` plus those of `cram`, to which the notes on chains,
    arguments, errors and state apply.

    Args:
      loss_fn: see `cram`; also the further arguments.
      projector: the compression :math:`C`.
      rho: radius of the ascent step, or a schedule of the step count.
      sparse_gradients: whether to keep the gradient of kept weights alone.
      normalize: whether to normalise the gradient before the ascent.
      has_aux: whether ``loss_fn`` returns auxiliary data.
      axis_name: under `jax.pmap` or `jax.shard_map`, the axes to average over.
      key: seed or PRNG key, for projectors that draw.

    Returns:
      A gradient transformation with the state `CramState`. ``update`` needs ``params``.

    Raises:
      TypeError: as `cram`.
      ValueError: as `cram`.

    Example:
      >>> def loss_fn(params, batch):
      ...     return jnp.sum((batch @ params["kernel"]) ** 2)
      >>> params = {"kernel": jnp.array([[2.0], [1.0]])}
      >>> batch = jnp.eye(2)
      >>> optimizer = optax.chain(
      ...     cram_plus(loss_fn, top_k(0.5), rho=0.1),
      ...     optax.sgd(0.5),
      ... )
      >>> grads = jax.grad(loss_fn)(params, batch)
      >>> grads["kernel"].ravel()
      Array([4., 2.], dtype=float32)
      >>> updates, state = optimizer.update(
      ...     grads, optimizer.init(params), params, batch=batch
      ... )
      >>> updates["kernel"].ravel()
      Array([-4.4, -1. ], dtype=float32)

    Reference: Peste et al., CrAM, ICLR 2023, equation 4, arXiv 2207.14200.
    """
    init, compressed_gradient = cram(
        loss_fn,
        projector,
        rho,
        sparse_gradients=sparse_gradients,
        normalize=normalize,
        has_aux=has_aux,
        axis_name=axis_name,
        key=key,
    )

    def update(
        updates: Params,
        state: CramState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, CramState]:
        gradient, state = compressed_gradient(updates, state, params, **extra_args)
        return optax.tree.add(updates, gradient), state

    return optax.GradientTransformationExtraArgs(init, update)


def sam(
    loss_fn: Callable[..., Any],
    rho: float | optax.Schedule = 0.05,
    *,
    normalize: bool = True,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the one uphill: sharpness-aware minimisation.

    .. math:: u = \nabla L(\theta + \rho \nabla L(\theta) / \|\nabla L(\theta)\|)

    Exactly `cram` with the projector `identity` and ``normalize=True``: a baseline with
    the same calling convention and cost. A zero gradient gives no ascent.

    Args:
      loss_fn: see `cram`; also the further arguments.
      rho: radius of the ascent step, or a schedule of the step count.
      normalize: whether to divide the gradient by its norm over all parameters.
      has_aux: whether ``loss_fn`` returns auxiliary data.
      axis_name: under `jax.pmap` or `jax.shard_map`, the axes to average over.

    Returns:
      A gradient transformation with the state `CramState`, whose ``compressed_loss`` is
      the loss uphill. ``update`` needs ``params``.

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
    loss_fn: Callable[..., Any],
    projector: Projector,
    rho: float | optax.Schedule = 0.05,
    *,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Looks uphill of the compressed model: the paper's C-SAM (equation 11).

    .. math::
        (\hat\theta, M) = C(\theta), \quad
        g = \nabla L(\hat\theta) \odot M, \quad
        (\tilde\theta, \tilde M) = C(\theta + \rho g / \|g\|), \quad
        u = \nabla L(\tilde\theta) \odot \tilde M

    A baseline with the calling convention of `cram`, whose notes on chains, arguments,
    errors and state apply. It evaluates two gradients of its own, and does not look at
    the incoming ``updates``. Both projections of a step draw alike.

    Args:
      loss_fn: see `cram`; also the further arguments.
      projector: the compression :math:`C`.
      rho: radius of the ascent step, or a schedule of the step count.
      has_aux: whether ``loss_fn`` returns auxiliary data.
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
    check_arguments(projector, rho, has_aux=has_aux)
    gradient_at = gradient_of(loss_fn, has_aux=has_aux, axis_name=axis_name)

    def init(params: Params) -> CramState:
        return initial_state(params, projector, key)

    def update(
        updates: Params,
        state: CramState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, CramState]:
        del updates
        check_params(params)
        key, draw = jax.random.split(state.key)
        radius = rho(state.count) if callable(rho) else rho

        (compressed, masks), _ = projector.project(params, state.projector_state, draw)
        ascent = apply_masks(masks, gradient_at(compressed, extra_args)[1])
        perturbed = ascend(params, radius / safe_denominator(norm(ascent)), ascent)
        (compressed, masks), projector_state = projector.project(
            perturbed, state.projector_state, draw
        )
        loss, gradient = gradient_at(compressed, extra_args)
        gradient = apply_masks(masks, gradient)
        return gradient, next_state(state, key, projector_state, loss)

    return optax.GradientTransformationExtraArgs(init, update)
