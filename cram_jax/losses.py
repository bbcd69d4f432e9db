"""How a transformation evaluates the loss that it was given."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.projector import Params, leaf_path
from cram_jax.reshaping import split_axis

AxisName: TypeAlias = str | tuple[str, ...]

Gradient: TypeAlias = Callable[[Params, Mapping[str, Any]], tuple[jax.Array, Params]]
"""``(params, extra_args of update) -> (loss, gradient)``."""


def subsampled(
    loss_fn: Callable[..., Any], *arguments: str, every: int
) -> Callable[..., Any]:
    """A loss on every ``every``-th example of a batch: a cheaper compressed gradient.

    In `cram_plus` the dense gradient keeps the whole batch, and an update costs
    ``1 + 1 / every`` gradient evaluations in place of 2. The guide, under "What it
    costs", has figures of what that keeps of the accuracy.

    The examples are spread over the batch, so that under data parallelism each device
    uses its own: nothing is exchanged if it holds a multiple of ``every`` of them.

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
      >>> subsampled(loss_fn, "batch", every=2)(jnp.ones(1), batch=batch)
      Array(2., dtype=float32)
    """
    _check_subsampled(loss_fn, arguments, every)

    @functools.wraps(loss_fn)
    def loss(params: Params, **values: Any) -> Any:
        chosen = {
            name: jax.tree.map_with_path(
                lambda path, leaf, name=name: _every(
                    every, leaf, "/".join(filter(None, [name, leaf_path(path)]))
                ),
                value,
            )
            for name, value in values.items()
            if name in arguments
        }
        return loss_fn(params, **(values | chosen))

    return loss


def _every(every: int, leaf: jax.Array, name: str) -> jax.Array:
    if jnp.ndim(leaf) < 1:
        raise ValueError(
            f"{name} must have the examples along axis 0, got a scalar {leaf!r}"
        )
    leaf = jnp.asarray(leaf)
    if leaf.shape[0] % every:
        return leaf[::every]
    # Of the same entries, but plainly local where axis 0 is sharded.
    return split_axis(leaf, 0, every)[:, 0]


def _check_subsampled(
    loss_fn: Callable[..., Any], arguments: tuple[str, ...], every: int
) -> None:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")
    if isinstance(every, bool) or not isinstance(every, int | np.integer):
        raise TypeError(f"every must be an integer, got {every!r}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if not arguments:
        raise ValueError("arguments of loss_fn to subsample must be named, got none")
    parameters = inspect.signature(loss_fn).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in arguments:
        if name not in [*parameters][1:]:
            raise TypeError(
                f"loss_fn has no argument {name!r} to subsample, it has "
                f"{[*parameters][1:]}"
            )


class Caller(NamedTuple):
    """What a user who forgot an argument of the loss is told.

    Attributes:
      name: where the arguments should have come from.
      example: how to pass the missing one, which stands for ``{}``.
    """

    name: str
    example: str


_UPDATE = Caller("update(...)", "optimizer.update(grads, state, params, {}=...)")


def gradient_of(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool,
    axis_name: AxisName | None,
    caller: Caller = _UPDATE,
) -> Gradient:
    """Makes a function that gives the loss and its gradient at any parameters.

    Args:
      loss_fn: ``loss_fn(params, ...) -> scalar``, or ``(scalar, aux)`` with
        ``has_aux``.
      has_aux: whether ``loss_fn`` returns auxiliary data, which is dropped.
      axis_name: mapped axes to average over, under `jax.pmap` or `jax.shard_map`.
      caller: whose arguments they are, for the error about one that is missing.

    Returns:
      The function. It picks from the arguments of ``update`` those that ``loss_fn``
      names, and raises a TypeError that names one that is missing.

    Raises:
      TypeError: ``loss_fn`` is not a function, or cannot take its arguments by name.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")
    pick = _by_name(loss_fn, caller)
    value_and_gradient = jax.value_and_grad(_averaged(loss_fn, has_aux, axis_name))

    def gradient(
        params: Params, extra_args: Mapping[str, Any]
    ) -> tuple[jax.Array, Params]:
        loss, gradients = value_and_gradient(params, **pick(extra_args))
        if axis_name is not None:
            gradients = jax.lax.pmean(gradients, axis_name)
        return loss, gradients

    return gradient


def _by_name(
    loss_fn: Callable[..., Any], caller: Caller
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Picks from the arguments of ``update`` those that the loss names."""
    signature = inspect.signature(loss_fn)
    further = [*signature.parameters.values()][1:]
    if not signature.parameters or any(p.kind is p.POSITIONAL_ONLY for p in further):
        raise TypeError(
            f"loss_fn must take the parameters first and its further arguments by "
            f"name, got {loss_fn!r} with the signature {signature}"
        )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in further)
    named = {
        p.name: p.default is p.empty
        for p in further
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }

    def pick(extra_args: Mapping[str, Any]) -> dict[str, Any]:
        missing = [n for n, needed in named.items() if needed and n not in extra_args]
        if missing:
            raise TypeError(
                f"loss_fn needs the argument {missing[0]!r}, but {caller.name} got "
                f"{sorted(extra_args)}; pass it by name: "
                f"{caller.example.format(missing[0])}"
            )
        return {n: v for n, v in extra_args.items() if takes_all or n in named}

    return pick


def _averaged(
    loss_fn: Callable[..., Any], has_aux: bool, axis_name: AxisName | None
) -> Callable[..., jax.Array]:
    """The loss alone, averaged over devices.

    Where jax tracks which values vary over an axis, the gradient of this average is the
    average of the gradients, and averaging it again changes nothing; where it does not
    (pmap), the gradient is still the device's own.
    """

    def averaged(params: Params, **arguments: Any) -> jax.Array:
        loss = loss_fn(params, **arguments)
        if has_aux:
            loss, _ = loss
        return loss if axis_name is None else jax.lax.pmean(loss, axis_name)

    return averaged
