"""Losses made from losses: on part of the batch, and for narrow types."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.projector import leaf_path
from cram_jax.reshaping import gathered_axis, split_axis
from cram_jax.validation import check_function, check_integer, holds


def subsampled(
    loss_fn: Callable[..., Any], *arguments: str, every: int
) -> Callable[..., Any]:
    """A loss on every n-th example of a batch: a cheaper compressed gradient.

    In `cram_plus` the dense gradient keeps the whole batch, and an update costs
    ``1 + 1 / every`` gradient evaluations instead of 2. The guide, under "What it
    costs", shows how much of the accuracy that keeps.

    The examples are spread over the batch, so that under data parallelism each device
    uses its own: nothing is exchanged if it holds a multiple of ``every`` of them.

    A loss that closes over its batch, for ``value_fn``, can slice ``batch[::every]``.

    Args:
      loss_fn: the loss of `cram_plus`, a mean over examples.
      *arguments: names of its arguments that have the examples along axis 0: arrays or
        trees of arrays.
      every: 1 is the whole batch, 4 a quarter of it.

    Returns:
      The loss, with the signature of ``loss_fn``.

    Raises:
      TypeError: ``loss_fn`` is not a function or has no such argument, or ``every`` is
        not an integer.
      ValueError: ``every`` is below 1 or no argument is named; at use, if an array has
        no axis 0.

    Example:
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params) ** 2)
      >>> batch = jnp.array([[0.0], [1.0], [2.0], [3.0]])
      >>> subsampled(loss_fn, "batch", every=2)(jnp.ones(1), batch)
      Array(2., dtype=float32)
    """
    _check_subsampled(loss_fn, arguments, every)
    signature = inspect.signature(loss_fn)
    rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

    @functools.wraps(loss_fn)
    def loss(*values: Any, **named: Any) -> Any:
        bound = signature.bind(*values, **named)
        for given in (bound.arguments, *(bound.arguments.get(n, {}) for n in rest)):
            for name in arguments:
                if name in given:
                    given[name] = _every(every, given[name], name)
        return loss_fn(*bound.args, **bound.kwargs)

    return loss


def _every(every: int, tree: Any, name: str) -> Any:
    """Every n-th example of a tree of arrays."""

    def choose(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if jnp.ndim(leaf) < 1:
            place = "/".join(filter(None, [name, leaf_path(path)]))
            raise ValueError(
                f"{place} must have the examples along axis 0, got a scalar {leaf!r}"
            )
        leaf = jnp.asarray(leaf)
        size = leaf.shape[0]
        # The size is symbolic in a program for batches of any size.
        if not isinstance(size, int) or size % every:
            return gathered_axis(leaf, 0)[::every]
        # Selects the same entries by a reshape, which stays local if axis 0 is sharded.
        return split_axis(leaf, 0, every)[:, 0]

    return jax.tree.map_with_path(choose, tree)


def _check_subsampled(
    loss_fn: Callable[..., Any], arguments: tuple[str, ...], every: int
) -> None:
    check_function("loss_fn", loss_fn)
    check_integer("every", every, minimum=1)
    if not arguments:
        raise ValueError("arguments of loss_fn to subsample must be named, got none")
    first, *further = inspect.signature(loss_fn).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in further)
    names = [p.name for p in further if p.kind is not p.VAR_POSITIONAL]
    for name in arguments:
        if name == first.name or not (takes_all or name in names):
            raise TypeError(
                f"loss_fn has no argument {name!r} to subsample, it has {names}"
            )


def loss_scaled(
    loss_fn: Callable[..., Any], scale: float | jax.Array
) -> Callable[..., Any]:
    """The same loss, with gradients that do not underflow on their way back.

    For models that compute in float16. The gradient is multiplied by the scale at the
    loss, and divided by it again at the parameters: value and gradient are those of
    ``loss_fn``, except that small entries survive. That is loss scaling kept inside the
    loss: nothing that differentiates it, such as `cram_plus`, needs to know.

    The parameters and the loss itself should be float32. A scale that is too large
    gives infinite gradients.

    Args:
      loss_fn: ``loss_fn(params, ...) -> scalar``, or ``(scalar, aux)``.
      scale: a number, or a scalar array, such as the ``scale`` of Flax's
        ``DynamicScale``.

    Returns:
      The loss, with the signature of ``loss_fn``.

    Raises:
      TypeError: ``loss_fn`` is not a function, or ``scale`` not a number.
      ValueError: ``scale`` is not above 0 and finite.

    Example:
      >>> def loss_fn(params):
      ...     return 1e-4 * jnp.mean(params.astype(jnp.float16)).astype(jnp.float32)
      >>> params = jnp.ones(1000)
      >>> jax.grad(loss_fn)(params)[:2]
      Array([1.1920929e-07, 1.1920929e-07], dtype=float32)
      >>> jax.grad(loss_scaled(loss_fn, 1024.0))(params)[:2]
      Array([1.0000076e-07, 1.0000076e-07], dtype=float32)
    """
    check_function("loss_fn", loss_fn)
    is_number = isinstance(scale, float | int | np.number | np.ndarray | jax.Array)
    if not is_number or isinstance(scale, bool) or jnp.ndim(scale):
        raise TypeError(f"scale must be a number, got {scale!r}")
    is_traced = isinstance(scale, jax.core.Tracer)
    if not is_traced and not holds(lambda: 0 < scale < np.inf):
        raise ValueError(f"scale must be finite and above 0, got {scale!r}")

    @functools.wraps(loss_fn)
    def loss(params: Any, *values: Any, **named: Any) -> Any:
        wide = jnp.asarray(scale, jnp.float32)
        params = jax.tree.map(lambda leaf: _scale_gradient(leaf, 1 / wide), params)
        result = loss_fn(params, *values, **named)
        if isinstance(result, tuple):
            return (_scale_gradient(result[0], wide), *result[1:])
        return _scale_gradient(result, wide)

    return loss


@jax.custom_jvp
def _scale_gradient(value: jax.Array, scale: jax.Array) -> jax.Array:
    """The value, whose gradient is multiplied by the scale."""
    del scale
    return value


@_scale_gradient.defjvp
def _scale_tangent(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    value, scale = primals
    with jax.numpy_dtype_promotion("standard"):
        return value, (tangents[0] * scale).astype(tangents[0].dtype)
