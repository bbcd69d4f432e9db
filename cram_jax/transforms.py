"""Compression-aware update rules, as optax gradient transformations."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cram_jax.combinators import identity
from cram_jax.projector import Params, Projector, leaf_path


class CramState(NamedTuple):
    """State of `cram`, `cram_plus` and `sam`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      key: PRNG key for the projector's draws.
      projector_state: the projector's own state.
      compressed_loss: floating scalar, the loss at the compressed parameters in the last
        update; infinite before the first.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, over tuple.count
    key: jax.Array
    projector_state: Any
    compressed_loss: jax.Array


def cram(
    loss_fn: Callable[..., Any],
    projector: Projector,
    rho: float | optax.Schedule = 0.05,
    *,
    sparse_gradients: bool = True,
    normalize: bool = False,
    has_aux: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the one at the perturbed and compressed parameters.

    With parameters :math:`\theta`, loss :math:`L` and compression :math:`C` (equation 2):

    .. math::
        (\hat\theta, M) = C(\theta + \rho \nabla L(\theta)), \qquad
        u = \nabla L(\hat\theta) \odot M

    The incoming ``updates`` are the dense gradient :math:`\nabla L(\theta)`, which the
    caller has anyway, so an update costs one more evaluation of the gradient. The
    projector touches its prunable leaves, the ascent every leaf.

    Place it first in an `optax.chain`: what follows sees an ordinary gradient.
    `optax.masked` and `optax.partition` around it would hide parameters from the loss:
    put them after it. Under `optax.inject_hyperparams` name ``loss_fn`` and ``projector``
    in ``static_args``. Accumulate gradients inside ``loss_fn``: `optax.MultiSteps` would
    keep the compressed gradient of one micro-batch alone.

    A gradient that is not finite passes through as it is, for `optax.apply_if_finite`.

    Args:
      loss_fn: ``loss_fn(params, ...) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
        Its further arguments are taken by name from those of ``update``. Give both
        passes the same batch and the same dropout key.
      projector: the compression :math:`C`.
      rho: radius of the ascent step, at least 0, or a schedule of the step count.
      sparse_gradients: whether to keep the gradient of kept weights alone (:math:`M`;
        section 3.3), or the whole gradient straight through.
      normalize: whether to divide the gradient by its norm over all parameters before
        the ascent (appendix A.1); a zero gradient then gives no ascent.
      has_aux: whether ``loss_fn`` returns auxiliary data; that of the compressed pass is
        dropped, so batch statistics come from the dense pass alone.
      axis_name: under `jax.pmap` or `jax.shard_map`, the axes to average over.
      key: seed or PRNG key, for projectors that draw.

    Returns:
      A gradient transformation with the state `CramState`. ``update`` needs ``params``.

    Raises:
      TypeError: ``loss_fn`` or ``projector`` is not one, a parameter is not of a
        floating dtype or is hidden by `optax.masked`, or ``update`` lacks an argument of
        ``loss_fn``.
      ValueError: ``rho`` is negative, or ``update`` gets no ``params``.

    Example:
      >>> def loss_fn(params, batch):
      ...     return jnp.sum((batch @ params["kernel"]) ** 2)
      >>> params = {"kernel": jnp.array([[2.0], [1.0]])}
      >>> batch = jnp.eye(2)
      >>> optimizer = cram(loss_fn, top_k(0.5), rho=0.1)
      >>> updates, state = optimizer.update(
      ...     jax.grad(loss_fn)(params, batch), optimizer.init(params), params, batch=batch
      ... )
      >>> updates["kernel"].ravel(), state.compressed_loss
      (Array([4.8, 0. ], dtype=float32), Array(5.76, dtype=float32))

    Reference: Peste et al., CrAM, ICLR 2023, equation 2, arXiv 2207.14200.
    """
    _check_arguments(loss_fn, projector, rho)
    loss_arguments = _by_name(loss_fn)
    gradient_fn = jax.value_and_grad(
        _averaged(loss_fn, axis_name, has_aux), has_aux=has_aux
    )

    def init(params: Params) -> CramState:
        _check_params(params)
        return CramState(
            count=jnp.zeros([], jnp.int32),
            key=_as_key(key),
            projector_state=projector.init(params),
            compressed_loss=jnp.array(jnp.inf, _loss_dtype(params)),
        )

    def update(
        updates: Params,
        state: CramState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, CramState]:
        if params is None:
            raise ValueError("cram needs params in update(...), got None")
        _check_params(params)
        arguments = loss_arguments(extra_args)
        key, draw = jax.random.split(state.key)
        scale = rho(state.count) if callable(rho) else rho
        if normalize:
            norm = _norm(updates)
            scale = scale / jnp.where(norm == 0, 1, norm)

        perturbed = _ascend(params, scale, updates)
        (compressed, masks), projector_state = projector.project(
            perturbed, state.projector_state, draw
        )
        value, gradient = gradient_fn(compressed, **arguments)
        if axis_name is not None:
            gradient = jax.lax.pmean(gradient, axis_name)
        if sparse_gradients:
            gradient = jax.tree.map(
                lambda mask, g: jnp.where(mask, g, jnp.zeros_like(g)), masks, gradient
            )
        loss = value[0] if has_aux else value
        return gradient, CramState(
            count=optax.safe_increment(state.count),
            key=key,
            projector_state=projector_state,
            compressed_loss=loss.astype(state.compressed_loss.dtype),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def cram_plus(
    loss_fn: Callable[..., Any],
    projector: Projector,
    rho: float | optax.Schedule = 0.05,
    *,
    sparse_gradients: bool = True,
    normalize: bool = False,
    has_aux: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the compressed model's gradient to the dense one.

    With parameters :math:`\theta`, loss :math:`L` and compression :math:`C` (equation 4):

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
    axis_name: str | tuple[str, ...] | None = None,
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


def _check_arguments(loss_fn: Any, projector: Any, rho: Any) -> None:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")
    if not isinstance(projector, Projector):
        raise TypeError(f"projector must be a Projector, got {projector!r}")
    if callable(rho) or isinstance(rho, jax.core.Tracer):
        return
    if not isinstance(rho, float | int | np.number | np.ndarray | jax.Array):
        raise TypeError(f"rho must be a number or a schedule, got {rho!r}")
    if not rho >= 0:
        raise ValueError(f"rho must be at least 0, got {rho!r}")


def _check_params(params: Params) -> None:
    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_masked):
        if is_masked(leaf):
            raise TypeError(
                f"params[{leaf_path(path)!r}] is hidden by optax.masked or "
                f"optax.partition, but the loss needs the whole tree; put them after: "
                f"optax.chain(cram_plus(...), optax.masked(...))"
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params[{leaf_path(path)!r}] has dtype {jnp.result_type(leaf).name}, "
                f"expected a floating dtype"
            )


def _by_name(
    loss_fn: Callable[..., Any],
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Picks from the arguments of ``update`` those that the loss names."""
    _, *parameters = inspect.signature(loss_fn).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {
        p.name: p.default is p.empty
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }

    def pick(extra_args: Mapping[str, Any]) -> dict[str, Any]:
        missing = [n for n, needed in named.items() if needed and n not in extra_args]
        if missing:
            raise TypeError(
                f"loss_fn needs the argument {missing[0]!r}, but update(...) got "
                f"{sorted(extra_args)}; pass it by name: "
                f"optimizer.update(grads, state, params, {missing[0]}=...)"
            )
        return {n: v for n, v in extra_args.items() if takes_all or n in named}

    return pick


def _averaged(
    loss_fn: Callable[..., Any],
    axis_name: str | tuple[str, ...] | None,
    has_aux: bool,
) -> Callable[..., Any]:
    """The loss averaged over devices.

    Where jax tracks which values vary over an axis, the gradient of this average is the
    average of the gradients, and averaging it again changes nothing; where it does not
    (pmap), the gradient is still the device's own.
    """
    if axis_name is None:
        return loss_fn

    def averaged(params: Params, **arguments: Any) -> Any:
        value = loss_fn(params, **arguments)
        if has_aux:
            return jax.lax.pmean(value[0], axis_name), value[1]
        return jax.lax.pmean(value, axis_name)

    return averaged


def _ascend(params: Params, scale: Any, direction: Params) -> Params:
    return jax.tree.map(
        lambda p, d: (p + scale * d).astype(jnp.result_type(p)), params, direction
    )


def _norm(tree: Params) -> jax.Array:
    # In float32 at least: a sum of squares does not fit the narrow types.
    wide = jax.tree.map(
        lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree
    )
    return optax.tree.norm(wide)


def _loss_dtype(params: Params) -> jnp.dtype:
    return jnp.result_type(jnp.float32, *jax.tree.leaves(params))


def _as_key(key: int | jax.Array) -> jax.Array:
    if jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        # A copy, because a training step may donate its state.
        return jax.random.clone(key)
    return jax.random.key(key)
