"""What ``benchmark`` and ``tradeoff`` do."""

import dataclasses
import importlib.util
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.compression.options import PrunerOptions
from experiments.deployment.benchmark import Conduct, run_benchmark
from experiments.deployment.network import Subject
from experiments.deployment.subjects import subject_of
from experiments.deployment.tables import console_table, write_outcomes
from experiments.deployment.tradeoff import drawn_targets, plot_tradeoff
from experiments.errors import ConfigError
from experiments.evaluation.results import version
from experiments.runs.metrics import make_console

PACKAGES = ("cram-jax", "jax", "llvmlite", "onnxruntime", "openvino", "numpy")


def benchmark(
    networks: tuple[str, ...],
    conduct: Conduct,
    out: Path | None,
    data_dir: Path | None,
    pruning: PrunerOptions,
) -> None:
    """Compares engines on every network, prints tables, and stores the numbers."""
    check_llvmlite()
    console = make_console()
    say = partial(console.print, soft_wrap=True, highlight=False)
    subjects = [
        subject_of(what, conduct.targets, data_dir, pruning, say) for what in networks
    ]
    outcomes = []
    for subject in subjects:
        outcome = run_benchmark(subject, conduct, say)
        for batch in conduct.batches:
            for threads in conduct.threads:
                console.print(console_table(outcome, batch, threads))
        outcomes.append(outcome)
    if out is not None:
        for file in write_outcomes(outcomes, out, about(conduct)):
            say(str(file))


def tradeoff(
    run: Path,
    conduct: Conduct,
    out: Path | None,
    data_dir: Path | None,
    pruning: PrunerOptions,
) -> None:
    """Draws accuracy against time and size, and stores the numbers beside it."""
    check_llvmlite()
    console = make_console()
    say = partial(console.print, soft_wrap=True, highlight=False)
    subject = subject_of(str(run), conduct.targets, data_dir, pruning, say)
    if not conduct.targets:
        names = drawn_targets(subject.eval_targets)
        conduct = dataclasses.replace(conduct, targets=names)
    files = draw_tradeoff(subject, conduct, out or run / "tradeoff.png", console)
    for file in files:
        say(str(file))


def draw_tradeoff(
    subject: Subject, conduct: Conduct, picture: Path, console: Console
) -> list[Path]:
    """Measures, prints the table, and writes the picture and its numbers."""
    say = partial(console.print, soft_wrap=True, highlight=False)
    outcome = run_benchmark(subject, conduct, say)
    setting = conduct.batches[0], conduct.threads[0]
    console.print(console_table(outcome, *setting))
    title = f"{outcome.name}: one model, compressed in one shot"
    plot_tradeoff(outcome, setting, picture, title)
    written = write_outcomes([outcome], picture.with_suffix(".json"), about(conduct))
    return [picture, *written]


def about(conduct: Conduct) -> dict[str, Any]:
    """The machine, the versions and the settings, for the head of stored numbers."""
    from cram_jax.engine.targets import choose_target

    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.platform()}",
        "instruction_set": choose_target().name,
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "rounds": conduct.rounds,
        "calibration": f"{conduct.calibration} training examples, {conduct.method}",
    }


def check_llvmlite() -> None:
    """Raises if our engine cannot be used.

    Raises:
      ConfigError: llvmlite is not installed.
    """
    if importlib.util.find_spec("llvmlite") is None:
        raise ConfigError("the engine needs llvmlite: pip install 'cram_jax[engine]'")


def _processor() -> str:
    from cram_jax.engine.llvm import binding

    return str(binding().get_host_cpu_name())
