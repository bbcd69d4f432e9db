"""``train``: a recipe, a configuration file, or a run to resume."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.images.config import ImageConfig
from experiments.runs.loggers import LoggerName
from experiments.text.config import TextConfig
from experiments.verbs.common import start_jax
from experiments.verbs.configured import parse_configured


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
    No other option is needed, but for --model.module of a network of your own."""
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
        if self.resume and self.overwrite:
            raise ConfigError("overwrite removes the run that --resume goes on with")
        if not self.resume:
            self.configuration().check_inputs()

    def execute(self) -> None:
        """Trains."""
        start_jax()
        from experiments.sharding import join_processes

        join_processes(self.coordinator, self.processes, self.process)
        from experiments.commands.train import Conduct, train
        from experiments.training.loop import Cadence

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
    """Parses with the one configuration that is meant: its fields are options too."""
    made: Train = parse_configured("train", TrainImages, TrainText, arguments)
    return made
