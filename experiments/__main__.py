"""The command line: ``python -m experiments train|compress|evaluate|report|...``."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments import commands
from experiments.errors import UserError
from experiments.recipes import CONFIGS, TEXT_CONFIGS
from experiments.second_order import SecondOrder
from experiments.sharding import join_processes

ChosenConfig = tyro.extras.subcommand_type_from_defaults(CONFIGS | TEXT_CONFIGS)


@dataclass(frozen=True)
class Train:
    """Train a network from one of our configurations."""

    config: Annotated[ChosenConfig, tyro.conf.arg(name="")]
    """The configuration; its fields can be set by name."""
    run: Path | None = None
    """The run's directory; by default runs/NAME-METHOD-seedSEED."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default the user's cache."""
    mesh: str | None = None
    """Devices to share the work: data=4,fsdp=2 copies the model along the first axis,
    cuts it along the second, and gives each device an equal part of the batch, whose
    size is that of all devices together. By default one device, and with several
    processes data=ALL."""
    coordinator: str | None = None
    """HOST:PORT of process 0 where several processes train together, one on each host;
    or "auto" on TPU, Slurm, Open MPI and Kubernetes. They share the run's directory."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""
    workers: int = 0
    """Processes that decode large images; 0: threads. The result is the same."""
    resume: bool = False
    """Go on from the last checkpoint, on any mesh."""
    overwrite: bool = False
    """Remove an earlier run in the directory."""


@dataclass(frozen=True)
class Compress:
    """Compress a trained model in one shot and store the result."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    projector: str
    """The target: k90 (90 % zeros), u90 (in every layer), 2:4, 4bit, several, such as
    k90+4bit, or o90 (second order: oBERT, WoodFisher)."""
    out: Path | None = None
    """Directory of the compressed model; by default RUN/compressed/PROJECTOR."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default the user's cache."""
    second_order: SecondOrder = field(default_factory=SecondOrder)
    """How o90 goes about it."""


@dataclass(frozen=True)
class Evaluate:
    """Compress a trained model to many targets; print accuracies.

    Stopped, the same command goes on with the target it was at.
    """

    run: tyro.conf.Positional[Path]
    """Directory of the run, or of a compressed model."""
    targets: tuple[str, ...] = ()
    """What to compress to; by default the targets of the run's configuration."""
    calibrations: int = 3
    """Random draws of the images that recalibrate batch norm, of which the table gives
    mean and standard deviation."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default the user's cache."""
    second_order: SecondOrder = field(default_factory=SecondOrder)
    """How targets such as o90 go about it."""


@dataclass(frozen=True)
class Report:
    """Tables and pictures of evaluated runs, grouped by method."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs, each with what evaluate stored."""
    out: Path = Path("runs/report")
    """Where report.md, results.json and the pictures go."""


@dataclass(frozen=True)
class Export:
    """Write the model of a run on text as Hugging Face stores it."""

    run: tyro.conf.Positional[Path]
    """Directory of the run, or of a compressed model."""
    out: Path
    """The directory for config.json, model.safetensors and the vocabulary."""


@dataclass(frozen=True)
class Demo:
    """Train SGD, SAM and CrAM+ on digits, prune, compare: about two minutes."""

    run: Path = Path("runs/demo")
    """Where results, picture and models go."""
    seeds: int = 3
    """Runs of every method."""
    epochs: int | None = None
    """Epochs of CrAM+ and SAM (SGD trains twice as long); by default the recipe's."""
    data_dir: Path | None = None
    """Where the prepared data are kept; by default the user's cache."""


Command = tyro.conf.OmitSubcommandPrefixes[
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Compress, tyro.conf.subcommand("compress")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
]


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        command = tyro.cli(
            Command,
            prog="python -m experiments",
            description=__doc__,
            args=arguments,
            config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff),
        )
        match command:
            case Train(config):
                join_processes(command.coordinator, command.processes, command.process)
                commands.train(
                    config,
                    command.run,
                    command.data_dir,
                    command.mesh,
                    command.workers,
                    command.resume,
                    command.overwrite,
                )
            case Compress(run, projector, out, data_dir, second_order):
                commands.compress(run, projector, out, data_dir, second_order)
            case Evaluate(run, targets, calibrations, data_dir, second_order):
                commands.evaluate(run, targets, calibrations, data_dir, second_order)
            case Report(runs, out):
                commands.report(runs, out)
            case Export(run, out):
                commands.export(run, out)
            case Demo(run, seeds, epochs, data_dir):
                commands.demo(run, seeds, epochs, data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        advice = "train goes on with --resume, evaluate when it is called again"
        print(f"stopped; {advice}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
