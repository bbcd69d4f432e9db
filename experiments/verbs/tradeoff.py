"""``tradeoff``: one model, all its targets, accuracy against time and size."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.compression import targets
from experiments.compression.options import Layerwise, PrunerOptions
from experiments.compression.second_order import SecondOrder
from experiments.errors import ConfigError
from experiments.runs.directory import check_output, load_config
from experiments.verbs.common import check_named, start_jax


@dataclass(frozen=True)
class Tradeoff:
    """Draw what every target of one model costs and gains.

    Each is compiled for our engine in INT8 and evaluated on the whole evaluation set.
    The dense network in other engines is marked, in INT8 and in float32.
    """

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    target: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--targets"])] = ()
    """What to compress to; by default the sparse targets of the run's configuration."""
    batch: int = 1
    """Examples in a call."""
    threads: int = 1
    """Threads of a call."""
    rounds: int = 9
    """Measurements of each engine."""
    calibration: int = 1000
    """Training examples that INT8 is calibrated with."""
    method: Literal["minmax", "percentile", "least_squares"] = "minmax"
    """How our engine chooses the ranges of INT8 activations."""
    out: Path | None = None
    """The picture; JSON and Markdown go beside it. By default RUN/tradeoff.png."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default where the run found it."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""
    second_order: SecondOrder = field(default_factory=SecondOrder)
    """Settings of second-order targets such as o90."""
    layerwise: Layerwise = field(default_factory=Layerwise)
    """Settings of targets that look at layer inputs: w90, g90, rk90 and so on."""

    def check(self) -> None:
        """Targets are known, numbers in range, and the run can be read."""
        for name in self.target:
            targets.check(name)
        for field_name in ("batch", "threads", "rounds", "calibration"):
            if getattr(self, field_name) < 1:
                raise ConfigError(
                    f"{field_name} must be at least 1, got {getattr(self, field_name)}"
                )
        if self.out is not None:
            check_output(self.out, ".png", "tradeoff.*")
            check_output(self.out.with_suffix(".json"), ".json", "tradeoff.*")
        check_named(self.run, load_config(self.run), self.module)

    def execute(self) -> None:
        """Compiles, measures and draws."""
        start_jax()
        from experiments.commands.benchmark import tradeoff
        from experiments.deployment.benchmark import Conduct
        from experiments.deployment.tradeoff import ENGINES_DRAWN

        conduct = Conduct(
            engines=ENGINES_DRAWN,
            targets=self.target,
            batches=(self.batch,),
            threads=(self.threads,),
            rounds=self.rounds,
            calibration=self.calibration,
            method=self.method,
        )
        tradeoff(
            self.run,
            conduct,
            self.out,
            self.data_dir,
            PrunerOptions(self.second_order, self.layerwise),
        )
