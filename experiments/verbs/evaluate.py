"""``evaluate``: many targets, measured."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments.compression import targets
from experiments.compression.options import Layerwise, PrunerOptions
from experiments.compression.second_order import SecondOrder
from experiments.errors import ConfigError
from experiments.runs.directory import load_config
from experiments.verbs.common import check_named, start_jax


@dataclass(frozen=True)
class Evaluate:
    """Compress a trained model to many targets and print accuracies.

    If it is stopped, the same command continues with the target it was at. Stored
    results of other targets are kept.
    """

    run: tyro.conf.Positional[Path]
    """Directory of the run, or of a compressed model."""
    target: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--targets"])] = ()
    """What to compress to; by default the targets of the run's configuration."""
    calibrations: int = 3
    """Random draws of the images that batch norm is recalibrated on; the table gives
    mean and standard deviation over them."""
    out: Path | None = None
    """The JSON file of the results; by default RUN/evaluation.json."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default where the run found it."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""
    second_order: SecondOrder = field(default_factory=SecondOrder)
    """Settings of second-order targets such as o90."""
    layerwise: Layerwise = field(default_factory=Layerwise)
    """Settings of targets that look at layer inputs: w90, g90, rk90 and so on."""

    def check(self) -> None:
        """The targets have known names, and the run can be read."""
        for name in self.target:
            targets.check(name)
        if self.calibrations < 1:
            raise ConfigError(
                f"calibrations must be at least 1, got {self.calibrations}"
            )
        check_named(self.run, load_config(self.run), self.module)

    def execute(self) -> None:
        """Compresses and measures, target by target."""
        start_jax()
        from experiments.commands.evaluate import evaluate

        evaluate(
            self.run,
            self.target,
            self.calibrations,
            self.out,
            self.data_dir,
            PrunerOptions(self.second_order, self.layerwise),
        )
