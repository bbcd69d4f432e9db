"""From a configuration to an optax chain: the only place that builds one."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

import cram_jax
from cram_jax import Projector
from cram_jax.projector import leaf_path
from experiments.compression import targets
from experiments.compression.targets import LeafFilters
from experiments.config import OptimizerConfig
from experiments.errors import ConfigError
from experiments.methods.build import Inner, Setting, front_rule, wrapped
from experiments.methods.config import trains_for_one


def make_optimizer(
    config: OptimizerConfig,
    loss_fn: Callable[..., Any],
    steps: int,
    seed: int = 0,
    filters: LeafFilters | None = None,
    projector: Projector | None = None,
    *,
    plain: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a run.

    Args:
      config: the update rule and what follows it.
      loss_fn: ``loss_fn(params, ..., batch) -> (loss, auxiliary data)``.
      steps: length of the learning-rate schedule.
      seed: for the targets drawn.
      filters: which leaves the targets are about; by default all of two or more
        dimensions.
      projector: what is trained for; by default the targets of the configuration.
      plain: for a step that leaves out the rule: its state stays as it is.

    Returns:
      The chain; its ``update`` takes the arguments of ``loss_fn`` by name.
    """
    setting = Setting(config, loss_fn, steps, seed, filters or LeafFilters())
    rule = _update_rule(setting, projector)
    if plain:
        rule = optax.GradientTransformation(rule.init, optax.identity().update)

    members = _base_optimizer(config, steps)
    if config.clip_norm:
        members = [optax.clip_by_global_norm(config.clip_norm), *members]
    base = unfrozen = optax.chain(*members)
    freeze = []
    if config.frozen:
        frozen = _matching(config.frozen)
        base = optax.partition({True: optax.set_to_zero(), False: unfrozen}, frozen)
        freeze, members = [optax.masked(optax.set_to_zero(), frozen)], [base]
        if trains_for_one(config.rule):
            freeze.append(_none_pruned(setting, frozen))
    whole = wrapped(setting, Inner(base, unfrozen, learning_rate(config, steps)))
    hold = [cram_jax.keep_pruned(where=setting.filters.prunable)] * config.keep_pruned
    # Before the rule too: what is frozen or pruned takes no part in the ascent.
    before, after = [*hold, *freeze], [*(freeze if whole else []), *hold]
    members = members if whole is None else [whole]
    return optax.with_extra_args_support(optax.chain(*before, rule, *members, *after))


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then decay to zero along a cosine or a line, or no decay."""
    peak, warmup = config.learning_rate, round(config.warmup * steps)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    last = peak if config.schedule == "constant" else 0.0
    decay = optax.linear_schedule(peak, last, steps - warmup)
    if not warmup:
        return decay
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def _base_optimizer(
    config: OptimizerConfig, steps: int
) -> list[optax.GradientTransformation]:
    """Weight decay and the base optimiser."""
    decay = optax.add_decayed_weights(config.weight_decay)
    schedule = learning_rate(config, steps)
    if config.base == "sgd":
        descend = optax.sgd(schedule, config.momentum, nesterov=config.nesterov)
        return [decay, descend]
    return [optax.scale_by_adam(), decay, optax.scale_by_learning_rate(schedule)]


def _none_pruned(
    setting: Setting, frozen: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Does nothing, if no weight that is to be pruned is frozen.

    Raises:
      ConfigError: at ``init``, some are: they would count as zeros, but stay.
    """

    def init(params: Any) -> optax.EmptyState:
        if jax.tree.leaves(params):
            chosen = cram_jax.prunable(params, setting.filters.prunable)
            both = zip(jax.tree.leaves(frozen(params)), chosen, strict=True)
            if any(is_frozen and is_chosen for is_frozen, is_chosen in both):
                raise ConfigError(
                    f"frozen must match no weights that the rule {setting.config.rule} "
                    f"prunes, got {setting.config.frozen!r}"
                )
        return optax.EmptyState()

    return optax.GradientTransformation(init, optax.identity().update)


def _matching(pattern: str) -> Callable[[Any], Any]:
    """From a tree to whether the path of each leaf matches."""
    expression = re.compile(pattern)

    def matches(path: Any, leaf: Any) -> bool:
        del leaf
        return expression.search(leaf_path(path)) is not None

    def mask(tree: Any) -> Any:
        if not jax.tree.leaves(tree):  # the placeholder of optax.tree.map_params
            return tree
        found = jax.tree.map_with_path(matches, tree)
        if len(set(jax.tree.leaves(found))) != 2:
            raise ConfigError(
                f"frozen must match some parameters and not all, got {pattern!r}"
            )
        return found

    return mask


def _update_rule(
    setting: Setting, projector: Projector | None
) -> optax.GradientTransformation:
    config, loss_fn, _, seed, filters = setting
    options: dict[str, Any] = {
        "sparse_gradients": config.sparse_gradients,
        "normalize": config.normalize,
        "has_aux": True,
        "key": seed,
    }
    if config.subsample > 1:
        loss_fn = cram_jax.subsampled(loss_fn, "batch", every=config.subsample)
    match config.rule:
        case "none":
            return optax.identity()
        case "sam":
            return cram_jax.sam(loss_fn, config.rho, has_aux=True)
    projector = projector or _projector(config, filters)
    match config.rule:
        case "cram":
            return cram_jax.cram(loss_fn, projector, config.rho, **options)
        case "cram_plus":
            return cram_jax.cram_plus(loss_fn, projector, config.rho, **options)
        case "topk_plus":
            return cram_jax.cram_plus(loss_fn, projector, 0.0, **options)
    made = front_rule(setting._replace(loss_fn=loss_fn), projector)
    return optax.identity() if made is None else made  # it wraps the optimiser


def _projector(config: OptimizerConfig, filters: LeafFilters) -> Projector:
    projectors = [
        targets.projector(target, masks_every=config.masks_every, filters=filters)
        for target in config.train_targets
    ]
    return projectors[0] if len(projectors) == 1 else cram_jax.one_of(*projectors)
