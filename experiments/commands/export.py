"""Writes the model of a run on text as others store it."""

from pathlib import Path

from experiments import checkpoints
from experiments.errors import ConfigError
from experiments.kinds import kind_of
from experiments.metrics import make_console
from experiments.run_directory import load_config


def export(run: Path, out: Path, vocabulary: Path | None) -> None:
    """Writes the model of a run on text as Hugging Face stores it."""
    config = load_config(run)
    if out.exists() and out.resolve() == run.resolve():
        raise ConfigError(f"out must be a directory of its own, got {out}, the run's")
    params, _ = checkpoints.read_model(run)
    kind_of(config).export(config, params, run, out, vocabulary)
    names = sorted(path.name for path in out.iterdir())
    make_console().print(f"{out}: {', '.join(names)}", soft_wrap=True)
