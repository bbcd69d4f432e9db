"""From a configuration to an optax chain: the only place that spells one."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import cram_jax
from cram_jax import Projector
from experiments import targets
from experiments.config import OptimizerConfig


def make_optimizer(
    config: OptimizerConfig, loss_fn: Callable[..., Any], steps: int, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a run.

    Args:
      config: the update rule and what follows it.
      loss_fn: ``loss_fn(params, ..., batch) -> (loss, auxiliary data)``.
      steps: length of the learning-rate schedule.
      seed: for the targets drawn.

    Returns:
      The chain; its ``update`` takes the arguments of ``loss_fn`` by name.
    """
    return optax.with_extra_args_support(
        optax.chain(
            _update_rule(config, loss_fn, seed),
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(
                learning_rate(config, steps), config.momentum, nesterov=config.nesterov
            ),
            *([keep_zeros()] if config.keep_pruned else []),
        )
    )


def keep_zeros() -> optax.GradientTransformationExtraArgs:
    """`cram_jax.keep_pruned` with the masks of a model that is pruned already.

    Returns:
      A transformation; the masks that its ``init`` finds live in its state.
    """

    def init(params: Any) -> cram_jax.pruning.KeepPrunedState:
        masks = jax.tree.map(lambda leaf: (leaf != 0) | (leaf.ndim < 2), params)
        return cram_jax.keep_pruned(masks).init(params)

    return optax.GradientTransformationExtraArgs(init, cram_jax.keep_pruned(()).update)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine decay to zero."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, round(config.warmup * steps), steps
    )


def _update_rule(
    config: OptimizerConfig, loss_fn: Callable[..., Any], seed: int
) -> optax.GradientTransformation:
    options: dict[str, Any] = {
        "sparse_gradients": config.sparse_gradients,
        "normalize": config.normalize,
        "has_aux": True,
        "key": seed,
    }
    if config.subsample > 1:
        loss_fn = cram_jax.subsampled(loss_fn, "batch", every=config.subsample)
    match config.method:
        case "sgd":
            return optax.identity()
        case "sam":
            return cram_jax.sam(loss_fn, config.rho, has_aux=True)
        case "cram":
            return cram_jax.cram(loss_fn, _projector(config), config.rho, **options)
        case "cram_plus":
            return cram_jax.cram_plus(
                loss_fn, _projector(config), config.rho, **options
            )
        case "topk_plus":
            return cram_jax.cram_plus(loss_fn, _projector(config), 0.0, **options)
    raise ValueError(f"method must be a known one, got {config.method!r}")


def _projector(config: OptimizerConfig) -> Projector:
    projectors = [
        targets.projector(target, masks_every=config.masks_every)
        for target in config.targets
    ]
    return projectors[0] if len(projectors) == 1 else cram_jax.one_of(*projectors)
