"""What the update rules have in common: their state, the ascent, the checks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cram_jax.projector import Params, Projector, leaf_path


class CramState(NamedTuple):
    """State of `cram`, `cram_plus` and `sam`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      key: PRNG key for the projector's draws.
      projector_state: the projector's own state.
      compressed_loss: floating scalar, the loss at the compressed parameters in the
        last update; infinite before the first.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, over tuple.count
    key: jax.Array
    projector_state: Any
    compressed_loss: jax.Array


def initial_state(
    params: Params, projector: Projector, key: int | jax.Array
) -> CramState:
    """The state before the first update."""
    check_params(params)
    loss_dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    return CramState(
        count=jnp.zeros([], jnp.int32),
        key=_as_key(key),
        projector_state=projector.init(params),
        compressed_loss=jnp.array(jnp.inf, loss_dtype),
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


def _as_key(key: int | jax.Array) -> jax.Array:
    if jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        # A copy, because a training step may donate its state.
        return jax.random.clone(key)
    return jax.random.key(key)


def check_arguments(projector: Any, rho: Any, **flags: Any) -> None:
    """Raises an error that names the argument, its value and what was expected."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if not isinstance(projector, Projector):
        raise TypeError(f"projector must be a Projector, got {projector!r}")
    if callable(rho) or isinstance(rho, jax.core.Tracer):
        return
    is_number = isinstance(rho, float | int | np.number | np.ndarray | jax.Array)
    if not is_number or np.ndim(rho) > 0:
        raise TypeError(f"rho must be a number or a schedule, got {rho!r}")
    if not rho >= 0:
        raise ValueError(f"rho must be at least 0, got {rho!r}")


def check_params(params: Params) -> None:
    """Raises an error where the loss could not be evaluated at the parameters."""
    if params is None:
        raise ValueError("params must be given to update(...), got None")

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


def ascend(params: Params, radius: Any, direction: Params) -> Params:
    """``params + radius * direction``, in the dtypes of the parameters."""
    return jax.tree.map(
        lambda p, d: (p + radius * d).astype(jnp.result_type(p)), params, direction
    )


def norm(tree: Params) -> jax.Array:
    """The Euclidean norm over all leaves."""
    # In float32 at least: a sum of squares does not fit the narrow types.
    wide = jax.tree.map(
        lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree
    )
    return optax.tree.norm(wide)
