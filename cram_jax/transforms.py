"""Compression-aware update rules, as optax gradient transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cram_jax.gradients import AxisName, gradient_at_update
from cram_jax.keys import check_key, key_data, split_key_data
from cram_jax.paths import check_shapes
from cram_jax.projector import (
    Params,
    Projector,
    apply_masks,
    check_projector,
    check_structure,
    leaf_path,
    safe_denominator,
    widened,
)
from cram_jax.validation import check_flag, check_state, check_strength


class CramState(NamedTuple):
    """State of the update rules.

    Attributes:
      count: int32 scalar, the number of updates so far.
      key: uint32 array, the data of the PRNG key for the projector's draws.
      projector_state: the projector's own state.
      compressed_loss: floating scalar, the loss at the compressed parameters in the
        last update; before the first, the largest number of its dtype.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, over tuple.count
    key: jax.Array
    projector_state: Any
    compressed_loss: jax.Array


def cram(
    loss_fn: Callable[..., Any] | None,
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
    caller has anyway, so an update costs one more gradient evaluation. The projector
    changes its prunable leaves, the ascent every leaf.

    The loss is given once: as ``loss_fn``, whose further arguments ``update`` takes by
    name; or as None, and then ``update`` takes ``value_fn``, a function of the
    parameters, as optax's line searches do. The second suits a loop whose loss closes
    over its batch, random keys and statistics. The guide, under "Training loops", shows
    both with Flax, Equinox and Haiku. Give both passes the same batch and the same
    dropout key.

    With the Python number ``rho=0`` and ``normalize=False`` there is no ascent, and
    ``updates`` is not read: pass ``params`` for it and save a gradient evaluation.

    Place it first in an `optax.chain`: what follows sees an ordinary gradient. After
    `optax.sgd` or `optax.scale` it would climb along a step instead of the gradient,
    which it cannot detect. `optax.masked` and `optax.partition` around it would hide
    parameters from the loss: put them after it. Under `optax.inject_hyperparams` name
    ``loss_fn`` and ``projector`` in ``static_args``. Accumulate gradients inside the
    loss: `optax.MultiSteps` around the rule would only keep the compressed gradient of
    one micro-batch.

    Non-finite gradients pass through unchanged. `optax.apply_if_finite` checks its
    input; chain it after `cram` to cover the compressed pass as well.

    The draws of a projector depend only on ``key`` and the number of updates: the same
    key gives the same run, bit for bit, on the same backend.

    Args:
      loss_fn: ``loss_fn(params, ...) -> scalar``, or ``(scalar, aux)`` with
        ``has_aux``; None if it arrives as ``value_fn``.
      projector: the compression :math:`C`.
      rho: radius of the ascent step, at least 0, or a schedule of the step count.
      sparse_gradients: if True, zero the gradient of pruned weights (:math:`M`; section
        3.3); if False, use the straight-through gradient.
      normalize: whether to divide the gradient by its norm over all parameters before
        the ascent (appendix A.1); a zero gradient then gives no ascent.
      has_aux: whether the loss returns auxiliary data; that of the compressed pass is
        dropped, so batch statistics come only from the dense pass.
      axis_name: under `jax.pmap` or `jax.shard_map`, the axes to average over.
        `jax.shard_map` tells if it is missing, unless ``check_vma`` is False or the
        parameters vary over the axis too, as they do after `jax.lax.all_gather`.
      key: seed or PRNG key, for projectors that draw.

    Returns:
      A gradient transformation with the state `CramState`. ``update`` needs ``params``.

    Raises:
      TypeError: ``loss_fn``, ``projector`` or ``key`` is not one; a parameter is not a
        floating array or is hidden by `optax.masked`; ``update`` lacks the loss or one
        of its arguments, or gets the loss twice, or a state that is not from
        ``init``; the loss does not return a scalar.
      ValueError: ``rho`` is negative or not finite; ``update`` gets no ``params``, or
        ``updates`` of a different structure; the loss differs between devices along an
        axis that ``axis_name`` does not name.

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

      The same with a loss that arrives at ``update``:

      >>> optimizer = cram(None, top_k(0.5), rho=0.1)
      >>> updates, state = optimizer.update(
      ...     grads,
      ...     optimizer.init(params),
      ...     params,
      ...     value_fn=lambda params: loss_fn(params, batch),
      ... )
      >>> updates["kernel"].ravel()
      Array([4.8, 0. ], dtype=float32)

    Reference: Peste et al., CrAM, ICLR 2023, equation 2, arXiv 2207.14200.
    """
    check_rule(projector, rho, key)
    check_flag("sparse_gradients", sparse_gradients)
    check_flag("normalize", normalize)
    check_flag("has_aux", has_aux)
    gradient_at = gradient_at_update(loss_fn, has_aux=has_aux, axis_name=axis_name)
    # Under inject_hyperparams rho is an array, whose value a program cannot know.
    climbs = normalize or not isinstance(rho, float | int | np.number) or rho != 0

    def init(params: Params) -> CramState:
        return initial_state(params, projector, key)

    def update(
        updates: Params,
        state: CramState,
        /,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, CramState]:
        check_params(params)
        check_state(state, CramState)
        key_after, draw = split_key_data(state.key, key)
        perturbed = params
        if climbs:
            check_updates(updates, params)
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
        return gradient, next_state(state, key_after, projector_state, loss)

    return optax.GradientTransformationExtraArgs(init, update)


def cram_plus(
    loss_fn: Callable[..., Any] | None,
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

    The dense model stays about as accurate as with plain training, and its compressed
    versions come close. The two gradients are added, not averaged, so a learning rate
    tuned for plain training may want to be a little smaller.

    Exactly the incoming ``updates`` plus those of `cram`, to which the notes on chains,
    losses, errors and state apply.

    Args:
      loss_fn: ``loss_fn(params, ...) -> scalar``, whose further arguments ``update``
        takes by name; or None, and ``update`` takes ``value_fn``. See `cram`.
      projector: the compression :math:`C`.
      rho: radius of the ascent step, or a schedule of the step count.
      sparse_gradients: whether to zero the gradient of pruned weights.
      normalize: whether to normalise the gradient before the ascent.
      has_aux: whether the loss returns auxiliary data.
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
        /,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, CramState]:
        gradient, state = compressed_gradient(updates, state, params, **extra_args)
        check_updates(updates, params)
        return optax.tree.add(updates, gradient), state

    return optax.GradientTransformationExtraArgs(init, update)


def initial_state(
    params: Params, projector: Projector, key: int | jax.Array
) -> CramState:
    """The state before the first update."""
    check_params(params)
    with jax.numpy_dtype_promotion("standard"):
        loss_dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    return CramState(
        count=jnp.zeros([], jnp.int32),
        key=key_data(key),
        projector_state=projector.init(params),
        # Not infinity, which jax_debug_infs reports as an error.
        compressed_loss=jnp.array(jnp.finfo(loss_dtype).max, loss_dtype),
    )


def next_state(
    state: CramState, key: jax.Array, projector_state: Any, loss: jax.Array
) -> CramState:
    """The state after an update with that loss at the compressed parameters."""
    return CramState(
        count=optax.safe_increment(state.count),
        key=key,
        projector_state=projector_state,
        compressed_loss=loss.astype(state.compressed_loss.dtype),
    )


def ascend(params: Params, radius: Any, direction: Params) -> Params:
    """``params + radius * direction``, in the dtypes of the parameters."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(
            lambda p, d: (p + radius * d).astype(jnp.result_type(p)), params, direction
        )


def norm(tree: Params) -> jax.Array:
    """The Euclidean norm over all leaves."""
    # A sum of squares does not fit the narrow types.
    with jax.numpy_dtype_promotion("standard"):
        return optax.tree.norm(jax.tree.map(widened, tree))


def check_rule(projector: Any, rho: Any, key: Any) -> None:
    """Raises an error that names the argument, its value and what was expected."""
    check_projector("projector", projector)
    check_key(key)
    check_strength("rho", rho)


def check_params(params: Params) -> None:
    """Raises an error if the loss could not be evaluated at the parameters."""
    if params is None:
        raise ValueError("params must be given to update(...), got None")
    if isinstance(params, optax.LookaheadParams):
        raise TypeError(
            "params must be those of the model, got LookaheadParams; update the rule "
            "by itself, with params.fast, and then optax.lookahead"
        )

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_masked):
        place = f"params[{leaf_path(path)!r}]"
        if is_masked(leaf):
            raise TypeError(
                f"{place} is hidden by optax.masked or optax.partition, but the loss "
                f"needs the whole tree; put them after: "
                f"optax.chain(cram_plus(...), optax.masked(...))"
            )
        if not hasattr(leaf, "dtype") and not isinstance(leaf, float):
            raise TypeError(
                f"{place} must be an array, got {leaf!r}; pass only the arrays, such "
                f"as equinox.filter(model, equinox.is_inexact_array)"
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{place} has dtype {jnp.result_type(leaf).name}, expected a floating "
                f"dtype"
            )


def check_updates(updates: Any, params: Params) -> None:
    """Raises a ValueError unless the updates are shaped like the parameters."""
    structure: Any = jax.tree.structure(params)
    if jax.tree.structure(updates) == structure:
        check_shapes("updates", updates, params)
        return
    if isinstance(updates, tuple) and structure in map(jax.tree.structure, updates):
        raise ValueError(
            f"updates must be only the gradient, got a tuple of {len(updates)}: "
            f"jax.grad(..., has_aux=True) returns (gradient, auxiliary data), "
            f"jax.value_and_grad (loss, gradient)"
        )
    check_structure("updates", updates, params)
