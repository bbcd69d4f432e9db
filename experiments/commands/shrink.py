"""Cuts channels out of a trained model and stores the smaller network as a run."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax

from cram_jax.structure import (
    Structure,
    check_apply,
    kept_groups,
    shrink,
    small_shapes,
)
from cram_jax.structure.costs import total
from experiments.commands.compress import check_out, store
from experiments.config import RunConfig
from experiments.errors import ConfigError, command_line
from experiments.evaluation.evaluation import check_targets, make_evaluation
from experiments.evaluation.open_run import open_run
from experiments.kinds import kind_of
from experiments.runs.directory import load_config
from experiments.runs.metrics import make_console
from experiments.task import Task


def shrink_run(
    run: Path, target: str, out: Path, overwrite: bool, data_dir: Path | None
) -> None:
    """Compresses, recalibrates batch norm, shrinks, stores; prints a summary."""
    check_out(out, run, target, overwrite=overwrite)
    say = partial(make_console().print, soft_wrap=True)
    opened = open_run(run, data_dir, say)
    config, data, task, params, batch_stats = opened
    check_targets((target,), config, task)
    evaluation = make_evaluation(config, data, task)
    before = evaluation.accuracy(params, batch_stats)
    masked, masks = evaluation.compress(params, target, batch_stats)
    statistics = evaluation.recalibrate(masked, batch_stats)
    after = evaluation.accuracy(masked, statistics)

    structure = _structure(task)
    kept = kept_groups(structure.part(lambda variables: variables[0]), masks)
    small_config = shrunken(config, data, structure, kept, target)
    small_task = kind_of(config).make_task(small_config, data)
    check_network(config, task, small_task, kept)
    small, small_statistics = shrink(structure, (masked, statistics), kept)
    result = small_task.evaluate(small, small_statistics, data.evaluation)

    stored = shrunken(load_config(run), data, structure, kept, target)
    facts = {"target": target, "shrunken": True, task.metric: result[task.metric]}
    store(out, run, opened, (small, small_statistics), facts, data_dir, stored)
    costs = structure.costs
    products = [total(costs.multiply_adds, costs.parts, k) for k in (None, kept)]
    sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in (params, small)]
    say(
        f"Parameters {sizes[0]:,} -> {sizes[1]:,}, multiply-adds of one example "
        f"{products[0]:,} -> {products[1]:,}"
    )
    say(
        f"{task.metric.capitalize()} {before:.2f} % dense, {after:.2f} % masked, "
        f"{result[task.metric]:.2f} % shrunken. Stored in {out}"
    )
    again = ("--config", out / "config.json", "--init-from", out)
    learn = ("--teacher", run, "--optimizer.rule", "none")
    say(f"Next:\n  {command_line('train', *again, *learn)}")


def shrunken(
    config: RunConfig, data: Any, structure: Structure, kept: Any, target: str
) -> RunConfig:
    """The configuration of the smaller network.

    Args:
      config: of the dense network.
      data: its data.
      structure: of its parameters and batch statistics.
      kept: the groups that stay.
      target: what it was shrunk to.

    Returns:
      The same run with the smaller network, under its own name, evaluated dense.
    """
    model = kind_of(config).smaller_model(config, data, structure, kept)
    name = f"{config.name}-{target}"
    return dataclasses.replace(config, name=name, model=model, eval_targets=("dense",))


def check_network(config: RunConfig, task: Task, small_task: Task, kept: Any) -> None:
    """Raises unless the configured network computes what the masked one does.

    Raises:
      ConfigError: it says where the two differ.
    """
    dense, small = _structure(task), _structure(small_task)
    model = small.model
    assert model is not None  # it is of the whole
    built = {leaf.path: leaf.shape for leaf in small.leaves}
    wrong = [p for p, s in small_shapes(dense, kept).items() if built.get(p) != s]
    reason = (
        f"{wrong[0]} would have the shape {built.get(wrong[0])}"
        if wrong
        else check_apply(dense, kept, apply=model.apply)
    )
    if reason is not None:
        raise ConfigError(
            f"{config.model.title} cannot be built with the widths that are left: "
            f"{reason}"
        )


def _structure(task: Task) -> Structure:
    channels = task.filters.channels
    assert channels is not None  # or there would have been no such target
    return channels.structure
