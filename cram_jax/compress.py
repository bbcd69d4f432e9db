"""Compression in one shot, and training on under the masks that it gave."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cram_jax.projector import Params, Projection, Projector, check_structure, leaf_path


def compress(
    params: Params, projector: Projector, *, key: jax.Array | None = None
) -> Projection:
    """Compresses parameters in one shot.

    Use the projector that the model was trained for, or a milder one. The statistics of
    batch normalisation belong to the dense model: `recalibrate` them afterwards.

    Args:
      params: a pytree of floating-point arrays.
      projector: what to compress with.
      key: a PRNG key; needed by projectors that draw, such as `one_of`.

    Returns:
      The compressed parameters and the masks of the kept entries, both like ``params``.

    Raises:
      TypeError: the projector is not a projector.
      ValueError: the projector draws, and there is no key.

    Example:
      >>> compress({"kernel": jnp.array([[3.0, -1.0]])}, top_k(0.5))
      Projection(params={'kernel': Array([[3., 0.]], dtype=float32)}, \
masks={'kernel': Array([[ True, False]], dtype=bool)})

    Reference: Peste et al., CrAM, ICLR 2023, arXiv 2207.14200.
    """
    if not isinstance(projector, Projector):
        raise TypeError(f"projector must be a Projector, got {projector!r}")
    projection, _ = projector.project(params, projector.init(params), key)
    return projection


class KeepPrunedState(NamedTuple):
    """State of `keep_pruned`.

    Attributes:
      masks: bool, structure and shapes of the parameters.
    """

    masks: Params


def keep_pruned(masks: Params) -> optax.GradientTransformationExtraArgs:
    """Keeps pruned weights at exactly zero while the others train on.

    Put it last in the chain: momentum and weight decay then cannot bring a weight back.
    Parameters that were not pruned before are pruned by the first step.

    Args:
      masks: from `compress`: bool, like the parameters, True where a weight is kept.

    Returns:
      A gradient transformation. The masks live in its state, so that a checkpoint holds
      them and a compiled step does not.

    Raises:
      TypeError: a mask is not bool.
      ValueError: at ``init``, the masks do not have the structure and shapes of the
        parameters; at ``update``, ``params`` is None.

    Example:
      >>> params, masks = compress([jnp.array([[3.0, -1.0]])], top_k(0.5))
      >>> optimizer = optax.chain(optax.sgd(0.5), keep_pruned(masks))
      >>> grads = [jnp.array([[1.0, 1.0]])]
      >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
      >>> optax.apply_updates(params, updates)
      [Array([[2.5, 0. ]], dtype=float32)]
    """
    for path, mask in jax.tree.leaves_with_path(masks):
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(
                f"masks[{leaf_path(path)!r}] must be bool, got {jnp.result_type(mask)}"
            )

    def init(params: Params) -> KeepPrunedState:
        check_structure("masks", masks, params)
        for (path, mask), leaf in zip(
            jax.tree.leaves_with_path(masks), jax.tree.leaves(params), strict=True
        ):
            if jnp.shape(mask) != jnp.shape(leaf):
                raise ValueError(
                    f"masks[{leaf_path(path)!r}] must have the shape of its parameter "
                    f"{jnp.shape(leaf)}, got {jnp.shape(mask)}"
                )
        # Copies, because a training step may donate its state.
        return KeepPrunedState(jax.tree.map(jnp.array, masks))

    def update(
        updates: Params,
        state: KeepPrunedState,
        params: Params | None = None,
        **extra_args: object,
    ) -> tuple[Params, KeepPrunedState]:
        del extra_args
        if params is None:
            raise ValueError("keep_pruned needs params in update(...), got None")
        updates = jax.tree.map(
            lambda mask, u, p: jnp.where(mask, u, -p.astype(u.dtype)),
            state.masks,
            updates,
            params,
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)
