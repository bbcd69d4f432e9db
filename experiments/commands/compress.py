"""Compresses a trained model in one shot and stores it."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import cram_jax
from experiments.compression import targets
from experiments.compression.options import PrunerOptions
from experiments.config import RunConfig
from experiments.datasets import data_dir_note
from experiments.errors import ConfigError, RunError
from experiments.evaluation.evaluation import (
    check_targets,
    has_statistics,
    make_evaluation,
)
from experiments.evaluation.open_run import OpenRun, open_run, stored_data_dir
from experiments.kinds import kind_of
from experiments.runs import checkpoints
from experiments.runs.directory import (
    check_free,
    check_path,
    clear,
    load_config,
    locked,
    move,
    read_json,
    write_status,
    write_text,
)
from experiments.runs.metrics import make_console
from experiments.task import Model


def compress(
    run: Path,
    target: str,
    out: Path | None,
    overwrite: bool,
    data_dir: Path | None,
    pruning: PrunerOptions,
) -> None:
    """Compresses, recalibrates batch norm, stores the model, prints a summary."""
    out = out or run / "compressed" / target
    check_out(out, run, target, overwrite=overwrite)
    console = make_console()
    say = partial(console.print, soft_wrap=True)
    opened = open_run(run, data_dir, say)
    config, data, task, params, batch_stats = opened
    check_targets((target,), config, task)
    evaluation = make_evaluation(config, data, task, pruning)
    before = evaluation.accuracy(params, batch_stats)
    compressed, masks = evaluation.compress(params, target, batch_stats)
    statistics = evaluation.recalibrate(compressed, batch_stats)
    after = evaluation.accuracy(compressed, statistics)

    facts = {"target": target, task.metric: after}
    store(out, run, opened, (compressed, statistics), facts, data_dir)
    say(_shown(cram_jax.sparsity_report(compressed, masks)))
    recalibrated = " with batch norm recalibrated" if has_statistics(statistics) else ""
    say(
        f"\n{task.metric.capitalize()} {before:.2f} % dense, {after:.2f} % "
        f"compressed to {targets.label(target)}{recalibrated}. Stored in {out}"
    )


def _shown(report: cram_jax.SparsityReport) -> str:
    """The report without biases and norms, most of the leaves of a large network."""
    lines = str(report).splitlines()
    shown = [line for line in lines if not line.endswith("fewer than 2 dimensions")]
    if len(shown) < len(lines):
        count = len(lines) - len(shown)
        shown.append(f"not shown: {count} dense leaves of fewer than 2 dimensions")
    return "\n".join(shown)


MADE = {
    "compression.json",
    "config.json",
    "model",
    "status.json",
    "vocabulary",
    ".lock",
}
"""What `store` leaves."""


def check_out(out: Path, run: Path, target: str, *, overwrite: bool) -> None:
    """Raises unless a model that is made from a run may have a directory.

    Args:
      out: the directory. The same model, made before and not evaluated since, is
        replaced.
      run: that of the run.
      target: what the run is compressed to.
      overwrite: whether any other run there may be removed, see `check_free`.

    Raises:
      ConfigError: it is the run's.
      RunError: see `check_free`.
    """
    check_path(out)
    if out.exists() and out.resolve() in (run.resolve(), *run.resolve().parents):
        raise ConfigError(f"out must be a directory of its own, got {out}, the run's")
    made = out / "compression.json"
    if overwrite or not made.exists():
        check_free(out, overwrite=overwrite)
        return
    facts = read_json(made)
    others = sorted({path.name for path in out.iterdir()} - MADE)
    is_same = (facts.get("source"), facts.get("target")) == (str(run), target)
    if not is_same or others:
        holds = f"{facts.get('target')} of {facts.get('source')}"
        raise RunError(
            f"{out} holds {', '.join([holds, *others])}: choose another --out, or "
            f"replace it with --overwrite"
        )
    check_free(out, overwrite=True)


def store(
    out: Path,
    source: Path,
    run: OpenRun,
    model: Model,
    facts: dict[str, Any],
    data_dir: Path | None,
    config: RunConfig | None = None,
) -> None:
    """Stores a model that was made from a run as a run of its own.

    What was there stays until the new model is complete.

    Args:
      out: its directory; what `check_free` allowed to remove there is removed.
      source: that of the run it was made from.
      run: the same, opened.
      model: parameters and batch statistics.
      facts: its ``target``, and its accuracy by the metric that counts.
      data_dir: where tensorflow-datasets keeps its data; None: where the run found it.
      config: its configuration; by default that of the run.

    Raises:
      RunError: another process is writing there, or it cannot be written.
    """
    with locked(out):
        beside = out.with_name(f".{out.name[:200]}.part")
        shutil.rmtree(beside, ignore_errors=True)  # of a command that was killed
        try:
            checkpoints.save_model(beside, config or load_config(source), *model)
            kind_of(run.config).keep_sources(run.config, beside)
            facts = {"source": str(source)} | facts
            write_text(beside / "compression.json", json.dumps(facts, indent=2) + "\n")
            write_status(beside, **data_dir_note(data_dir or stored_data_dir(source)))
            clear(out)
            move(beside, out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
