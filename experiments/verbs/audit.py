"""``audit``: what compression changed, and for whom."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments.compression import targets
from experiments.compression.options import Layerwise
from experiments.compression.second_order import SecondOrder
from experiments.errors import ConfigError
from experiments.runs.directory import check_output, load_config
from experiments.verbs.common import check_named, start_jax


@dataclass(frozen=True)
class Audit:
    """Compare a classifier with its compressed versions: who gets different answers?

    Answers that differ from the dense network's, calibration error, uncertain answers,
    and accuracy by class and by group, on the evaluation set; batch norm recalibrated.
    """

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    target: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--targets"])] = ()
    """What to compress to; by default the targets of the run's configuration."""
    groups: Path | None = None
    """A text file with the group of each example of the evaluation set, one per line;
    by default texts are grouped by length."""
    out: Path | None = None
    """The JSON file of the results; by default RUN/audit.json."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default where the run found it."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""
    second_order: SecondOrder = field(default_factory=SecondOrder)
    """Settings of second-order targets such as o90."""
    layerwise: Layerwise = field(default_factory=Layerwise)
    """Settings of targets that look at layer inputs: w90, g90, rk90 and so on."""

    def check(self) -> None:
        """The targets have known names, and the files can be read."""
        for name in self.target:
            targets.check(name)
        if self.groups is not None and not self.groups.is_file():
            raise ConfigError(f"groups must be a text file, got {self.groups}")
        if self.out is not None:
            check_output(self.out, ".json", "audit.json")
        check_named(self.run, load_config(self.run), self.module)

    def execute(self) -> None:
        """Compresses and compares, target by target."""
        start_jax()
        from experiments.commands.audit import audit

        audit(self)
