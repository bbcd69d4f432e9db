"""How a transformation evaluates its loss."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from cram_jax.projector import Params
from cram_jax.validation import check_function

AxisName: TypeAlias = str | tuple[str, ...]

Gradient: TypeAlias = Callable[[Params, Mapping[str, Any]], tuple[jax.Array, Params]]
"""``(params, extra_args of update) -> (loss, gradient)``."""


class Caller(NamedTuple):
    """What to tell a user who forgot an argument of the loss.

    Attributes:
      name: where the arguments should have come from.
      example: how to pass the missing one, which stands for ``{}``.
      if_none: what else may be wrong if no argument came at all.
    """

    name: str
    example: str
    if_none: str = ""


_UPDATE = Caller(
    "update(...)",
    "optimizer.update(grads, state, params, {}=...)",
    " (TrainState.apply_gradients passes none on: call state.tx.update(...) and "
    "state.replace(...) instead)",
)


def gradient_at_update(
    loss_fn: Callable[..., Any] | None, *, has_aux: bool, axis_name: AxisName | None
) -> Gradient:
    """Like `gradient_of`, for a loss that is known now or arrives at ``update``.

    Args:
      loss_fn: the loss; None if it is the argument ``value_fn`` of ``update``.
      has_aux: whether the loss returns auxiliary data, which is dropped.
      axis_name: mapped axes to average over, under `jax.pmap` or `jax.shard_map`.

    Returns:
      The function. It raises a TypeError if the loss arrives twice, or not at all.

    Raises:
      TypeError: see `gradient_of`.
    """
    options: dict[str, Any] = {"has_aux": has_aux, "axis_name": axis_name}
    known = None if loss_fn is None else gradient_of(loss_fn, **options)

    def gradient(
        params: Params, extra_args: Mapping[str, Any]
    ) -> tuple[jax.Array, Params]:
        arguments = dict(extra_args)
        value_fn = arguments.pop("value_fn", None)
        if known is None and value_fn is None:
            raise TypeError(
                "the loss is missing: the rule was made with loss_fn=None, so pass "
                "optimizer.update(grads, state, params, value_fn=loss_at_params)"
                + ("" if extra_args else _UPDATE.if_none)
            )
        if known is not None and value_fn is not None:
            raise TypeError(
                "the loss is given twice, as loss_fn and as value_fn of update(...); "
                "make the rule with loss_fn=None to use value_fn"
            )
        found = known or gradient_of(value_fn, name="value_fn", **options)
        return found(params, arguments)

    return gradient


def gradient_of(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool,
    axis_name: AxisName | None,
    caller: Caller = _UPDATE,
    name: str = "loss_fn",
) -> Gradient:
    """Makes a function that returns the loss and its gradient at any parameters.

    Args:
      loss_fn: ``loss_fn(params, ...) -> scalar``, or ``(scalar, aux)`` with
        ``has_aux``.
      has_aux: whether ``loss_fn`` returns auxiliary data, which is dropped.
      axis_name: mapped axes to average over, under `jax.pmap` or `jax.shard_map`.
      caller: whose arguments they are, for the error about one that is missing.
      name: of the loss, for errors.

    Returns:
      The function. It picks the arguments of ``update`` that ``loss_fn`` names, and
      raises a TypeError that names a missing one.

    Raises:
      TypeError: ``loss_fn`` is not a function, or cannot take its arguments by name.
    """
    check_function(name, loss_fn)
    pick = _by_name(loss_fn, caller, name)
    value_and_gradient = jax.value_and_grad(
        _averaged(loss_fn, has_aux, axis_name, name)
    )

    def gradient(
        params: Params, extra_args: Mapping[str, Any]
    ) -> tuple[jax.Array, Params]:
        arguments = pick(extra_args)

        def at(params: Params) -> tuple[jax.Array, Params]:
            return value_and_gradient(params, **arguments)

        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
            # As a trace of its own. Flax asks every array for its sharding, and for a
            # traced one jax goes through all that was traced before.
            at = jax.jit(at, inline=True)
        loss, gradients = at(params)
        axes = _names(axis_name)
        return loss, jax.tree.map(lambda leaf: _total(leaf, axes), gradients)

    return gradient


def _by_name(
    loss_fn: Callable[..., Any], caller: Caller, name: str
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Picks the arguments of ``update`` that the loss names."""
    signature = inspect.signature(loss_fn)
    further = [*signature.parameters.values()][1:]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in further)
    # Wrappers with *args and **kwargs pass on what they get by name.
    has_unnamed = any(
        p.kind is p.POSITIONAL_ONLY or (p.kind is p.VAR_POSITIONAL and not takes_all)
        for p in further
    )
    if not signature.parameters or has_unnamed:
        raise TypeError(
            f"{name} must take the parameters first and its further arguments by "
            f"name, got {loss_fn!r} with the signature {signature}"
        )
    named = {
        p.name: p.default is p.empty
        for p in further
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }

    def pick(extra_args: Mapping[str, Any]) -> dict[str, Any]:
        missing = [n for n, needed in named.items() if needed and n not in extra_args]
        if "params" in missing:
            raise TypeError(
                f"{name} must take the parameters first, got {loss_fn!r} with the "
                f"signature {signature}"
            )
        if missing:
            raise TypeError(
                f"{name} needs the argument {missing[0]!r}, but {caller.name} got "
                f"{sorted(extra_args)}; pass it by name: "
                f"{caller.example.format(missing[0])}"
                + ("" if extra_args else caller.if_none)
            )
        return {n: v for n, v in extra_args.items() if takes_all or n in named}

    return pick


def _averaged(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    axis_name: AxisName | None,
    name: str,
) -> Callable[..., jax.Array]:
    """Only the loss, averaged over devices. See `_total` for its gradient."""

    def averaged(params: Params, **arguments: Any) -> jax.Array:
        result = _call(loss_fn, params, arguments, name)
        loss = jnp.asarray(_scalar(result, has_aux, name))
        _check_axes(loss, params, axis_name)
        return loss if axis_name is None else jax.lax.pmean(loss, axis_name)

    return averaged


def _total(gradient: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    """The gradient of the averaged loss with respect to what all devices share.

    If jax knows that the parameter varies over an axis, as after `jax.lax.all_gather`,
    a device has only the share of the average that depends on its own copy: sum them.
    If it knows that the parameter does not vary, the gradient is complete, and its mean
    is itself. If it does not know (pmap), the gradient is that of the device's loss.
    """
    varying = _varying_axes(gradient)
    copied = tuple(axis for axis in axes if axis in varying)
    others = tuple(axis for axis in axes if axis not in varying)
    if copied:
        gradient = jax.lax.psum(gradient, copied)
    return jax.lax.pmean(gradient, others) if others else gradient


def _call(
    loss_fn: Callable[..., Any], params: Params, arguments: dict[str, Any], name: str
) -> Any:
    """Calls the loss; explains the error of taking the parameters for the model."""
    try:
        return loss_fn(params, **arguments)
    except (TypeError, AttributeError) as error:
        kind = type(params).__name__
        # A module without its functions, as equinox.filter leaves it, calls a None.
        holes = {kind, "NoneType"} if _has_none(params) else {kind}
        is_called = str(error) in {f"{hole!r} object is not callable" for hole in holes}
        is_asked = isinstance(error, AttributeError) and error.obj is params
        if not (is_called or is_asked):
            raise
        raise TypeError(
            f"{name} gets the parameters, here a {kind}, not the model: {error}. Make "
            f"the model from them first: nnx.merge(graphdef, params, copy=True), "
            f"equinox.combine(params, static) or model.apply({{'params': params}}, x)"
        ) from error


def _has_none(params: Params) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=lambda node: node is None)
    return any(leaf is None for leaf in leaves)


def _scalar(result: Any, has_aux: bool, name: str) -> Any:
    """The loss of what the function returned."""
    if has_aux:
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise TypeError(
                f"{name} must return (loss, auxiliary data) with has_aux=True, got "
                f"{_kind(result)}"
            )
        result, _ = result
    if isinstance(result, tuple | list):
        raise TypeError(
            f"{name} must return a scalar, got {_kind(result)}; if that is the loss "
            f"and auxiliary data, pass has_aux=True"
        )
    is_array = hasattr(result, "dtype") or isinstance(result, float | int)
    if not is_array or jnp.shape(result):
        raise TypeError(
            f"{name} must return a scalar, such as the mean over examples, got "
            f"{_kind(result)}"
        )
    return result


def _kind(result: Any) -> str:
    if isinstance(result, tuple | list):
        return f"a {type(result).__name__} of {len(result)}"
    if hasattr(result, "shape"):
        return f"an array of shape {result.shape}"
    return f"a {type(result).__name__}"


def _check_axes(loss: Any, params: Params, axis_name: AxisName | None) -> None:
    """Raises if only the loss differs between devices, and nothing averages it.

    `jax.shard_map` reports which values vary, unless ``check_vma`` is False; `jax.pmap`
    does not.
    """
    varying = _varying_axes(loss).difference(
        _names(axis_name), *map(_varying_axes, jax.tree.leaves(params))
    )
    if varying:
        axes = ", ".join(map(repr, sorted(varying, key=str)))
        raise ValueError(
            f"axis_name must name the axes that the batch is spread over, got "
            f"{axis_name!r}: the loss differs between devices along {axes}, and the "
            f"parameters do not"
        )


def _names(axis_name: AxisName | None) -> tuple[Any, ...]:
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def _varying_axes(value: Any) -> frozenset[Any]:
    kind = jax.typeof(value)
    # Older jax calls it vma.
    manual = getattr(kind, "mat", None)
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying
