"""The command line: ``python -m experiments train|compress|evaluate|report|...``.

Nothing here imports jax before it is needed: the first line of help takes a second.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import targets
from experiments.config import RunConfig
from experiments.errors import ConfigError, Stopped, UserError
from experiments.images.config import ImageConfig
from experiments.loggers import LoggerName
from experiments.recipes import RECIPES, summary
from experiments.second_order import SecondOrder
from experiments.stored_config import from_dict
from experiments.text.config import TextConfig

PROGRAM = "python -m experiments"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a network: a recipe, a configuration file, or a run that goes on.

    train RECIPE [options] starts one of our recipes; ``recipes`` lists them. Every
    field of its configuration can be set by name.
    """

    config: Path | None = None
    """A YAML or JSON file in place of a recipe: fields of a configuration, those of a
    ``recipe`` that it may name by default."""
    resume: Path | None = None
    """The directory of a run to go on with, from its last checkpoint that is whole, on
    any mesh. Nothing else is needed."""
    run: Path | None = None
    """The run's directory; by default runs/NAME-RULE-seedSEED."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default the user's cache. A run
    remembers it."""
    overwrite: bool = False
    """Remove an earlier run in the directory."""
    dry_run: bool = False
    """Build everything and take one step; nothing is written."""
    max_steps: int | None = None
    """Stop after so many steps, with a checkpoint; the schedule stays the same."""
    save_steps: int = 0
    """Steps between checkpoints, beside those of --checkpoint-every."""
    save_minutes: float = 0.0
    """Minutes between checkpoints, of a run in one process."""
    keep: int = 2
    """How many of the last checkpoints are kept."""
    logger: tuple[LoggerName, ...] = ("tensorboard",)
    """Where figures go beside metrics.jsonl: tensorboard, wandb, mlflow."""
    mesh: str | None = None
    """Devices to share the work: data=4,fsdp=2 copies the model along the first axis,
    cuts it along the second, and gives each device an equal part of the batch, whose
    size is that of all devices together. By default one device, and with several
    processes data=ALL."""
    coordinator: str | None = None
    """HOST:PORT of process 0 if several processes train together, one on each host;
    or "auto" on TPU, Slurm, Open MPI and Kubernetes. They share the run's directory."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""
    workers: int = 0
    """Processes that decode large images; 0: threads. The result is the same."""


@dataclass(frozen=True, kw_only=True)
class TrainImages(Train):
    """Train a network on images."""

    fields: Annotated[ImageConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TrainText(Train):
    """Train a network on text."""

    fields: Annotated[TextConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Compress:
    """Compress a trained model in one shot and store the result."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    target: str
    """k90 (90 % zeros), u90 (in every layer), b90 (in blocks of 4 inputs x 2 outputs;
    b90@8x1 for others), 2:4, 4bit, several, such as k90+4bit, or o90 (second order:
    oBERT, WoodFisher)."""
    out: Path | None = None
    """Directory of the compressed model; by default RUN/compressed/TARGET."""
    overwrite: bool = False
    """Remove an earlier run in that directory."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default where the run found it."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""
    second_order: SecondOrder = field(default_factory=SecondOrder)
    """How o90 goes about it."""


@dataclass(frozen=True)
class Evaluate:
    """Compress a trained model to many targets; print accuracies.

    Stopped, the same command goes on with the target it was at. What is stored of other
    targets stays.
    """

    run: tyro.conf.Positional[Path]
    """Directory of the run, or of a compressed model."""
    target: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--targets"])] = ()
    """What to compress to; by default the targets of the run's configuration."""
    calibrations: int = 3
    """Random draws of the images that recalibrate batch norm, of which the table gives
    mean and standard deviation."""
    out: Path | None = None
    """The JSON file of the results; by default RUN/evaluation.json."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default where the run found it."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""
    second_order: SecondOrder = field(default_factory=SecondOrder)
    """How targets such as o90 go about it."""


@dataclass(frozen=True)
class Report:
    """Tables and pictures of evaluated runs, grouped by method."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs, each with what evaluate stored."""
    out: Path = Path("runs/report")
    """Where report.md, results.json and the pictures go."""
    json: bool = False
    """Print the results as JSON instead of tables, and write nothing."""


@dataclass(frozen=True)
class Export:
    """Write the model of a run on text as Hugging Face stores it."""

    run: tyro.conf.Positional[Path]
    """Directory of the run, or of a compressed model."""
    out: Path
    """The directory for config.json, model.safetensors and the vocabulary."""
    vocabulary: Path | None = None
    """vocab.txt or tokenizer.json, or a directory with one; by default the run's."""


@dataclass(frozen=True)
class Recipes:
    """List the recipes that train knows, one a line."""


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
    | Annotated[Recipes, tyro.conf.subcommand("recipes")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
]


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with _terminated_by_signal():
            _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt as interrupt:
        again = " evaluate goes on when it is called again" * ("evaluate" in arguments)
        print(f"stopped;{again or ' nothing was saved just now'}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:
        print(f"cram-jax {importlib.metadata.version('cram-jax')}")
        return
    if arguments[:1] == ["train"]:
        _train(arguments[1:])
        return
    command: Any = tyro.cli(
        Command,
        prog=PROGRAM,
        description=(__doc__ or "").split("\n")[0],
        args=arguments,
        config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff),
    )
    if isinstance(command, Recipes):
        for name, config in RECIPES.items():
            print(f"{name:<32} {summary(config)}")
        return
    if isinstance(command, Report):
        _report(command)
        return
    if not isinstance(command, Demo):
        _check_run(command)
    _remember_compilations()
    from experiments import commands

    match command:
        case Compress():
            commands.compress(**_fields(command))
        case Evaluate():
            options = _fields(command)
            commands.evaluate(names=options.pop("target"), **options)
        case Export():
            commands.export(**_fields(command))
        case Demo():
            commands.demo(**_fields(command))


def _train(arguments: list[str]) -> None:
    """Parses with the one configuration that is meant, and trains."""
    base, rest = _base(arguments)
    shape: Any = TrainText if isinstance(base, TextConfig) else TrainImages
    command = tyro.cli(
        shape,
        prog=f"{PROGRAM} train RECIPE",
        description=f"{Train.__doc__}\n\nShown are the options of {base.name}.",
        default=shape(fields=base),
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    _remember_compilations()
    from experiments.sharding import join_processes

    join_processes(command.coordinator, command.processes, command.process)
    from experiments import commands
    from experiments.training import Cadence

    if command.resume and command.run and command.run != command.resume:
        raise ConfigError("resume names the run already; leave out --run")
    commands.train(
        command.fields,
        commands.Conduct(
            run=command.resume or command.run,
            data_dir=command.data_dir,
            mesh=command.mesh,
            workers=command.workers,
            resume=command.resume is not None,
            overwrite=command.overwrite,
            cadence=Cadence(command.save_steps, command.save_minutes, command.keep),
            max_steps=command.max_steps,
            dry_run=command.dry_run,
            loggers=tuple(dict.fromkeys(command.logger)),
        ),
    )


def _base(arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """The configuration that options change, and the options."""
    recipe = arguments[0] if arguments and not arguments[0].startswith("-") else None
    resume, file = _option(arguments, "--resume"), _option(arguments, "--config")
    named = [name for name in (recipe, resume, file) if name is not None]
    if len(named) > 1:
        raise ConfigError(
            f"train needs a recipe, --config or --resume, got {' and '.join(named)}"
        )
    if resume is not None:
        from experiments.run_directory import load_config

        stored = load_config(Path(resume))
        _check_named(Path(resume), stored, _option(arguments, "--model.module"))
        return stored, arguments
    if file is not None:
        return _read_config(Path(file)), arguments
    if recipe is None:
        if {"-h", "--help"} & set(arguments):
            return RECIPES["digits"], arguments
        raise ConfigError(
            f"train needs a recipe, such as digits; {PROGRAM} recipes lists them"
        )
    return _recipe(recipe), arguments[1:]


def _recipe(name: Any) -> RunConfig:
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, 3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"no recipe is called {name!r}; {meant}{PROGRAM} recipes lists them"
        )
    return RECIPES[name]


def _read_config(file: Path) -> RunConfig:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ConfigError(f"it must hold fields, got {type(values).__name__}")
        recipe = values.pop("recipe", None)
        base = None if recipe is None else _recipe(recipe)
        config: RunConfig = from_dict(values, base)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read {file}: {reason}") from error
    return config


def _report(command: Report) -> None:
    from experiments.metrics import make_console
    from experiments.report import gather, print_report, write_report

    sections = gather(command.runs)
    if command.json:
        print(json.dumps({name: results for name, results, _ in sections}, indent=2))
        return
    console = make_console()
    print_report(sections, console)
    for file in write_report(sections, command.out):
        console.print(str(file), soft_wrap=True)


def _fields(command: Any) -> dict[str, Any]:
    names = [entry.name for entry in dataclasses.fields(command)]
    return {name: getattr(command, name) for name in names if name != "module"}


def _check_run(command: Any) -> None:
    """Says at once what is wrong with the run or the targets that a command names."""
    from experiments.run_directory import load_config

    if isinstance(command, Compress):
        targets.check(command.target)
    if isinstance(command, Evaluate):
        for name in command.target:
            targets.check(name)
        if command.calibrations < 1:
            raise ConfigError(
                f"calibrations must be at least 1, got {command.calibrations}"
            )
    config = load_config(command.run)
    if isinstance(command, Compress | Evaluate):
        _check_named(command.run, config, command.module)


def _check_named(run: Path, config: RunConfig, named: str | None) -> None:
    """Code that a stored configuration names is run only if the user names it too."""
    stored = config.model.module if isinstance(config, ImageConfig) else ""
    if stored and named != stored:
        raise ConfigError(
            f"{run} is of the network {stored}, whose code is run only if you name it "
            f"too: add --module {stored} (for train --model.module {stored})"
        )


def _option(arguments: list[str], name: str) -> str | None:
    """The value of an option that is needed before the others can be parsed."""
    for index, word in enumerate(arguments):
        if word == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _remember_compilations() -> None:
    """What one command has compiled the next one loads, unless jax is set otherwise."""
    print("starting jax ...", file=sys.stderr, flush=True)
    import jax

    from experiments.datasets import default_data_dir

    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        folder = default_data_dir() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, with a word on how to go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        del number, frame
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
