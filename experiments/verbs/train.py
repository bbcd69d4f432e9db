"""``train``: a recipe, a configuration file, or a run to resume."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.images.config import ImageConfig
from experiments.loggers import LoggerName
from experiments.recipes import RECIPES
from experiments.stored_config import from_dict
from experiments.text.config import TextConfig
from experiments.verbs.common import PROGRAM, check_named, recipe_named, start_jax


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a network: from a recipe, from a configuration file, or resume a run.

    ``train RECIPE`` starts a recipe; ``recipes`` lists them. Every field of its
    configuration is an option.
    """

    config: Path | None = None
    """A YAML or JSON file instead of a recipe. It holds fields of a configuration; a
    ``recipe`` that it names supplies the others."""
    resume: Path | None = None
    """The directory of a run to resume, from its last intact checkpoint, on any mesh.
    No other option is needed."""
    run: Path | None = None
    """The run's directory; by default runs/NAME-RULE-seedSEED."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default the user's cache. The run
    remembers it."""
    overwrite: bool = False
    """Remove an earlier run in the directory."""
    dry_run: bool = False
    """Build everything and take one step; nothing is written."""
    max_steps: int | None = None
    """Stop at this step, with a checkpoint; the schedule stays the same."""
    save_steps: int = 0
    """Steps between checkpoints, in addition to those of --checkpoint-every."""
    save_minutes: float = 0.0
    """Minutes between checkpoints; only for a single process."""
    keep: int = 2
    """How many of the last checkpoints to keep."""
    logger: tuple[LoggerName, ...] = ("tensorboard",)
    """Where metrics go in addition to metrics.jsonl: tensorboard, wandb, mlflow."""
    mesh: str | None = None
    """Devices to share the work: data=4,fsdp=2 copies the model along the first axis,
    cuts it along the second, and gives each device an equal part of the batch, whose
    size is that of all devices together. By default one device, and with several
    processes data=ALL."""
    coordinator: str | None = None
    """HOST:PORT of process 0 if several processes train together, one on each host;
    "auto" on TPU, Slurm, Open MPI and Kubernetes. All need to see the run's
    directory."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""
    workers: int = 0
    """Processes that decode large images; 0: threads. The result is the same."""

    def check(self) -> None:
        """The run is named once, and what it reads is there."""
        if self.resume and self.run and self.run != self.resume:
            raise ConfigError("resume names the run already; leave out --run")
        if not self.resume:
            self.configuration().check_inputs()

    def execute(self) -> None:
        """Trains."""
        start_jax()
        from experiments.sharding import join_processes

        join_processes(self.coordinator, self.processes, self.process)
        from experiments.commands.train import Conduct, train
        from experiments.training import Cadence

        train(
            self.configuration(),
            Conduct(
                run=self.resume or self.run,
                data_dir=self.data_dir,
                mesh=self.mesh,
                workers=self.workers,
                resume=self.resume is not None,
                overwrite=self.overwrite,
                cadence=Cadence(self.save_steps, self.save_minutes, self.keep),
                max_steps=self.max_steps,
                dry_run=self.dry_run,
                loggers=tuple(dict.fromkeys(self.logger)),
            ),
        )

    def configuration(self) -> RunConfig:
        """The run's; its fields are options of the classes below."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TrainImages(Train):
    """Train a network on images."""

    fields: Annotated[ImageConfig, tyro.conf.arg(name="")]

    def configuration(self) -> RunConfig:
        return self.fields


@dataclass(frozen=True, kw_only=True)
class TrainText(Train):
    """Train a network on text."""

    fields: Annotated[TextConfig, tyro.conf.arg(name="")]

    def configuration(self) -> RunConfig:
        return self.fields


def parse_train(arguments: list[str]) -> Train:
    """Parses with the configuration that is named, whose fields are options too."""
    base, rest = _base(arguments)
    shape: Any = TrainText if isinstance(base, TextConfig) else TrainImages
    return tyro.cli(
        shape,
        prog=f"{PROGRAM} train RECIPE",
        description=f"{Train.__doc__}\n\nShown are the options of {base.name}.",
        default=shape(fields=base),
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff,),
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
        check_named(Path(resume), stored, _option(arguments, "--model.module"))
        return stored, arguments
    if file is not None:
        return _read_config(Path(file)), arguments
    if recipe is None:
        if {"-h", "--help"} & set(arguments):
            return RECIPES["digits"], arguments
        raise ConfigError(
            f"train needs a recipe, such as digits; {PROGRAM} recipes lists them"
        )
    return recipe_named(recipe), arguments[1:]


def _read_config(file: Path) -> RunConfig:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ConfigError(f"it must hold fields, got {type(values).__name__}")
        recipe = values.pop("recipe", None)
        base = None if recipe is None else recipe_named(recipe)
        config: RunConfig = from_dict(values, base)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read {file}: {reason}") from error
    return config


def _option(arguments: list[str], name: str) -> str | None:
    """The value of an option that is needed before the others can be parsed."""
    for index, word in enumerate(arguments):
        if word == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
