"""From a configuration to a method that prunes during training."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import optax

import cram_jax
from cram_jax import Projector
from experiments.compression import targets
from experiments.compression.targets import LeafFilters
from experiments.config import OptimizerConfig
from experiments.errors import ConfigError
from experiments.methods import dynamic, estimators, learned, masks, multipliers
from experiments.methods.frank_wolfe import frank_wolfe
from experiments.methods.platon import platon

Sparsifier = tuple[Callable[[Any], Projector], float]
"""From a share of zeros to a projector, and the share that a target wants."""


class Setting(NamedTuple):
    """What every method of a run is made from.

    Attributes:
      config: of the optimiser.
      loss_fn: ``loss_fn(params, ..., batch) -> (loss, auxiliary data)``.
      steps: of the whole run.
      seed: for rules that draw.
      filters: which leaves the targets are about.
    """

    config: OptimizerConfig
    loss_fn: Callable[..., Any]
    steps: int
    seed: int
    filters: LeafFilters

    def step(self, share: float) -> int:
        """The step after a share of the run."""
        return round(share * self.steps)


class Inner(NamedTuple):
    """The optimiser that a method wraps.

    Attributes:
      parameters: that of the parameters, with its weight decay.
      others: the same for other trees, where nothing is frozen.
      schedule: its learning rate.
    """

    parameters: optax.GradientTransformation
    others: optax.GradientTransformation
    schedule: optax.Schedule


def front_rule(
    setting: Setting, projector: Projector
) -> optax.GradientTransformation | None:
    """The rule that makes the gradient, before weight decay and the optimiser.

    Args:
      setting: the run.
      projector: of the targets.

    Returns:
      The rule; None if the method is not of this form.
    """
    config, loss_fn, steps, seed, filters = setting
    own = config.pruning
    strength = own.number("strength", config.rule)
    options: dict[str, Any] = {"has_aux": True, "key": seed}
    match config.rule:
        case "ste":
            return estimators.straight_through_estimator(loss_fn, projector, **options)
        case "dpf":
            make, share = sparsifier(config, filters)
            return estimators.dpf(
                loss_fn,
                make,
                share,
                begin=setting.step(own.begin),
                end=setting.step(own.end),
                every=own.every,
                **options,
            )
        case "sr_ste":
            return estimators.sr_ste(loss_fn, projector, strength, **options)
        case "admm":
            return multipliers.admm(projector, strength, steps, every=own.every)
        case "elsa":
            return multipliers.elsa(projector, strength, every=own.every)
        case "safe":
            return multipliers.safe(
                loss_fn,
                projector,
                strength,
                steps,
                rho=config.rho,
                every=own.every,
                has_aux=True,
            )
    return None


def wrapped(setting: Setting, inner: Inner) -> optax.GradientTransformation | None:
    """The optimiser as a method wraps or replaces it.

    Args:
      setting: the run.
      inner: the optimiser.

    Returns:
      The optimiser; None if the method is not of this form.
    """
    config, _, steps, seed, filters = setting
    own = config.pruning
    begin, end = setting.step(own.begin), setting.step(own.end)
    # At least once after the end, so that the last sparsity is reached.
    every = min(own.every, max(steps - end, 1))
    match config.rule:
        case "gradual":
            make, share = sparsifier(config, filters)
            return masks.gradual(
                inner.parameters, make, share, begin=begin, end=end, every=every
            )
        case "acdc":
            make, share = sparsifier(config, filters)
            # Whole phases, so that masks change where the wave does.
            begin, end = (step // every * every for step in (begin, end))
            return masks.ac_dc(
                inner.parameters, make, share, begin=begin, end=end, phase=every
            )
        case "rigl" | "set":
            scope, share = _share(config)
            rule = dynamic.rigl(
                share,
                replaced=dynamic.annealed(own.replaced, max(end, 1)),
                grow="gradient" if config.rule == "rigl" else "random",
                densities="erk" if scope == "global" else "uniform",
                where=filters.prunable if scope == "global" else filters.uniform,
            )
            return cram_jax.pruned(inner.parameters, rule, every=own.every, key=seed)
        case "platon":
            _, share = _share(config)
            rule = platon(
                _cubic(0.0, share, begin, end),
                window=own.every,
                final=min(end, steps - 1),  # its last masks are those of the run
                where=filters.prunable,
            )
            return cram_jax.pruned(inner.parameters, rule, hold=False)
        case "sfw":
            return frank_wolfe(
                inner.schedule,
                density=1 - _share(config)[1],
                radius=own.radius,
                momentum=config.momentum,
                where=filters.prunable,
            )
        case "str" | "movement" | "soft_movement" | "l0":
            return _learned(setting, inner)
    return None


def _learned(setting: Setting, inner: Inner) -> optax.GradientTransformation:
    config = setting.config
    own = config.pruning
    begin, end = setting.step(own.begin), setting.step(own.end)
    each, strength = "weight", own.number("strength", config.rule)
    scale = own.number("score_rate", config.rule) / config.learning_rate
    scores: optax.GradientTransformation = optax.adam(
        lambda count: scale * inner.schedule(count)
    )
    match config.rule:
        case "str":
            method, each, scores = learned.soft_thresholds(), "leaf", inner.others
        case "movement":
            kept = _cubic(1.0, 1 - _share(config)[1], begin, end)
            method = learned.movement(kept)
        case "soft_movement":
            method = learned.soft_movement(_cubic(0.0, 0.1, begin, end), strength)
        case _:
            method = learned.l0(strength)
    return learned.train_beside(
        inner.parameters,
        setting.loss_fn,
        method,
        partial(
            cram_jax.scores_like,
            value=own.number("score", config.rule),
            each=each,
            where=setting.filters.prunable,
        ),
        scores,
        steps=setting.steps,
        seed=setting.seed,
    )


def sparsifier(config: OptimizerConfig, filters: LeafFilters) -> Sparsifier:
    """How the one target of a configuration prunes, for shares that grow to its own.

    Raises:
      ConfigError: the target does more than prune.
    """
    (target,) = config.train_targets
    part, *others = targets.parse(target)

    def make(share: Any) -> Projector:
        return targets.without_data(part._replace(share=share), filters)

    if not others and part.form == "n of m":
        n, m = part.numbers
        return make, 1 - n / m
    known = ("channels",) if filters.channels is not None else ()
    if not others and part.form in ("global", "layer", "blocks", *known):
        return make, part.share
    raise ConfigError(
        f"train_targets must be one that only prunes for the rule {config.rule}, such "
        f"as k90, u90, b90, c90 or 2:4, got {target!r}"
    )


def _share(config: OptimizerConfig) -> tuple[str, float]:
    """The scope of the one target, "global" or "layer", and its share of zeros."""
    (target,) = config.train_targets
    scopes: tuple[Literal["global", "layer"], ...] = ("global", "layer")
    for scope in scopes:
        share = targets.sparsity(target, scope)
        if share:
            return scope, share
    raise ConfigError(
        f"train_targets must be a share of single weights for the rule {config.rule}, "
        f"such as k90 or u90, got {target!r}"
    )


def _cubic(first: float, last: float, begin: int, end: int) -> optax.Schedule:
    return optax.polynomial_schedule(first, last, 3, max(end - begin, 1), begin)
