"""One-shot compression, and further training under its masks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cram_jax.keys import as_key
from cram_jax.leaves import Where, prunable
from cram_jax.paths import check_masks, named_leaves
from cram_jax.projector import (
    Params,
    Projection,
    Projector,
    check_projector,
)
from cram_jax.validation import check_state


def compress(
    params: Params, projector: Projector, *, key: int | jax.Array | None = None
) -> Projection:
    """Compresses parameters in one shot.

    Use the projector that the model was trained for, or a milder one. The statistics of
    batch normalisation belong to the dense model: `recalibrate` them afterwards.

    Args:
      params: a pytree of floating-point arrays.
      projector: what to compress with.
      key: seed or PRNG key; needed by projectors that draw, such as `one_of`.

    Returns:
      The compressed parameters and the masks of the kept entries, both like ``params``.
      Outside `jax.jit`, leaves that the projector leaves alone are those of ``params``,
      not copies, which would double the memory of a large table. Before a step that
      donates one of the two trees, copy it: ``jax.tree.map(jnp.copy, params)``.

    Raises:
      TypeError: the projector or the key is not one.
      ValueError: the projector draws and there is no key; or it follows a schedule, see
        `scheduled`.

    Example:
      >>> compress({"kernel": jnp.array([[3.0, -1.0]])}, top_k(0.5))
      Projection(params={'kernel': Array([[3., 0.]], dtype=float32)}, \
masks={'kernel': Array([[ True, False]], dtype=bool)})

    Reference: Peste et al., CrAM, ICLR 2023, arXiv 2207.14200.
    """
    check_projector("projector", projector)
    if projector.is_scheduled:
        raise ValueError(
            f"projector must do the same at every use, got {projector!r}, which "
            f"follows a schedule; pass the one it ends with, such as top_k(0.9)"
        )
    draw = None if key is None else as_key(key)
    projection, _ = projector.project(params, projector.init(params), draw)
    return projection


class KeepPrunedState(NamedTuple):
    """State of `keep_pruned`.

    Attributes:
      masks: bool, structure and shapes of the parameters.
    """

    masks: Params


def keep_pruned(
    masks: Params | None = None, *, where: Where | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps pruned weights at exactly zero while the others keep training.

    Put it last in the chain: momentum and weight decay then cannot bring a weight back.
    It cannot detect what comes after it. The parameters that optimisers such as
    `optax.contrib.schedule_free` evaluate instead are dense: apply the masks to them.

    Args:
      masks: from `compress`: bool, like the parameters, True where a weight is kept.
        Parameters that were not pruned before are pruned by the first step. By default
        the weights that are zero when ``init`` sees them stay zero, including those of
        a kernel that starts at zero.
      where: without masks, the leaves whose zeros stay; by default those that
        `prunable` chooses. Zeros in other leaves are ordinary weights.

    Returns:
      A gradient transformation with the state `KeepPrunedState`: checkpoints hold the
      masks, compiled steps do not. The updates have the wider of the dtypes of the
      incoming updates and the parameters, because only that reaches exactly zero.

    Raises:
      TypeError: a mask is not bool.
      ValueError: masks and ``where`` are both given; at ``init``, the masks do not have
        the structure and shapes of the parameters; at ``update``, ``params`` is None.

    Example:
      >>> params, masks = compress([jnp.array([[3.0, -1.0]])], top_k(0.5))
      >>> optimizer = optax.chain(optax.sgd(0.5), keep_pruned())
      >>> grads = [jnp.array([[1.0, 1.0]])]
      >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
      >>> optax.apply_updates(params, updates)
      [Array([[2.5, 0. ]], dtype=float32)]
    """
    if masks is not None and where is not None:
        raise ValueError(
            "where says whose zeros stay if there are no masks, got both; pass one"
        )
    if masks is not None:
        check_masks("masks", masks, masks)

    def init(params: Params) -> KeepPrunedState:
        if not jax.tree.leaves(params):
            # The placeholder of optax.tree.map_params, which stands for the masks.
            return KeepPrunedState(params)
        if masks is None:
            return KeepPrunedState(_nonzero(params, where))
        return KeepPrunedState(_like(masks, params))

    def update(
        updates: Params,
        state: KeepPrunedState,
        /,
        params: Params | None = None,
        **extra_args: object,
    ) -> tuple[Params, KeepPrunedState]:
        del extra_args
        if params is None:
            raise ValueError("keep_pruned needs params in update(...), got None")
        check_state(state, KeepPrunedState)
        return jax.tree.map(held, state.masks, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def held(mask: jax.Array, update: jax.Array, param: jax.Array) -> jax.Array:
    """The update, or the one that takes the parameter to exactly zero."""
    # A parameter that was rounded to a narrower dtype would leave a remainder.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(*map(jnp.result_type, (update, param)))
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))


def _nonzero(params: Params, where: Where | None) -> Params:
    """Masks of the zeros in the chosen leaves."""
    leaves = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    return structure.unflatten(
        leaf != 0 if is_chosen else jnp.ones_like(leaf, dtype=bool)
        for leaf, is_chosen in zip(leaves, prunable(params, where), strict=True)
    )


def _like(masks: Params, params: Params) -> Params:
    """The masks in the structure of the parameters.

    `flax.nnx.Optimizer` passes a State of Variables to `init`, while the masks of
    `compress` come from the pure tree, whose leaves have the same paths.
    """
    check_masks("masks", masks, params)
    structure: Any = jax.tree.structure(params)
    # Copies, because a training step may donate its state.
    return structure.unflatten([jnp.array(mask) for _, mask in named_leaves(masks)])
