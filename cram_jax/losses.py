"""How a transformation evaluates the loss that it was given."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

from cram_jax.projector import Params

AxisName: TypeAlias = str | tuple[str, ...]

Gradient: TypeAlias = Callable[[Params, Mapping[str, Any]], tuple[jax.Array, Params]]
"""``(params, extra_args of update) -> (loss, gradient)``."""


def gradient_of(
    loss_fn: Callable[..., Any], *, has_aux: bool, axis_name: AxisName | None
) -> Gradient:
    """Makes a function that gives the loss and its gradient at any parameters.

    Args:
      loss_fn: ``loss_fn(params, ...) -> scalar``, or ``(scalar, aux)`` with
        ``has_aux``.
      has_aux: whether ``loss_fn`` returns auxiliary data, which is dropped.
      axis_name: mapped axes to average over, under `jax.pmap` or `jax.shard_map`.

    Returns:
      The function. It picks from the arguments of ``update`` those that ``loss_fn``
      names, and raises a TypeError that names one that is missing.

    Raises:
      TypeError: ``loss_fn`` is not a function, or cannot take its arguments by name.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")
    pick = _by_name(loss_fn)
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
    loss_fn: Callable[..., Any],
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
                f"loss_fn needs the argument {missing[0]!r}, but update(...) got "
                f"{sorted(extra_args)}; pass it by name: "
                f"optimizer.update(grads, state, params, {missing[0]}=...)"
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
