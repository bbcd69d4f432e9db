"""``allocate``: a sparsity for each layer under a budget."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from experiments.compression import targets
from experiments.compression.options import Layerwise
from experiments.errors import ConfigError
from experiments.runs.directory import load_config
from experiments.verbs.common import check_named, start_jax


@dataclass(frozen=True)
class Allocate:
    """Find how much of each layer to prune, and compare with uniform and global masks.

    SPDY: each layer is pruned to many sparsities separately; then a search finds the
    combination with the least loss on training examples within the budget. Each
    speedup's model is stored in RUN/compressed/spdySPEEDUPx-MEASURE-PRUNER. Models and
    sparsities that were found with other settings stay, with a number after their name.
    """

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    speedup: tuple[float, ...] = (2.0, 3.0, 4.0)
    """How many times less than the dense network the result may take."""
    measure: Literal["multiply_adds", "bytes", "seconds"] = "multiply_adds"
    """What it takes: multiply-adds without those with zeros; bytes, of packed layers;
    or seconds in our engine with one example, each layer timed on this machine."""
    pruner: str = "ru"
    """How layers are pruned: the letters of a target before its number, such as u, ru,
    g, w, rg or rw."""
    levels: int = 21
    """Sparsities of each layer: dense, and 40 to 99 %."""
    starts: int = 100
    """Random choices that the search starts with, and failures that end its steps."""
    examples: int = 1024
    """Training examples whose loss scores a choice."""
    seed: int = 0
    """Seed of the search."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default where the run found it."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""
    layerwise: Layerwise = field(default_factory=Layerwise)
    """Settings of pruners such as w, g and ru, which look at each layer's inputs."""

    def check(self) -> None:
        """The numbers are in range, and the run can be read."""
        if not self.speedup or not all(1 < s < math.inf for s in self.speedup):
            raise ConfigError(f"speedup must be above 1, got {self.speedup}")
        if not re.fullmatch("r?[uwg]", self.pruner):
            raise ConfigError(
                f"pruner must be u, w or g, perhaps after r, got {self.pruner!r}"
            )
        targets.check(f"{self.pruner}50")
        for name, least in (("levels", 3), ("starts", 1), ("examples", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )
        check_named(self.run, load_config(self.run), self.module)

    def execute(self) -> None:
        """Searches, and evaluates what it finds."""
        start_jax()
        from experiments.commands.allocate import allocate

        allocate(self)
