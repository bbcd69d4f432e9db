"""``compress``: one target, stored as a model."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from experiments.compression import targets
from experiments.compression.options import Layerwise, PrunerOptions
from experiments.compression.second_order import SecondOrder
from experiments.runs.directory import load_config
from experiments.verbs.common import check_named, start_jax


@dataclass(frozen=True)
class Compress:
    """Compress a trained model in one shot and store the result."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    target: str
    """k90 (90 % zeros; k90@cost by what weights cost), u90 (in every layer), b90 (in
    blocks of 4 inputs x 2 outputs; b90@8x1 for others), c50 (50 % of the channels),
    2:4, 4bit, several, such as k90+4bit; o90 (second order: oBERT, WoodFisher), w90 or
    w2:4 (Wanda), g90, g2:4 or g90@4bit (SparseGPT); rk90, rg2:4: what is kept refitted
    by least squares."""
    out: Path | None = None
    """Directory of the compressed model; by default RUN/compressed/TARGET."""
    overwrite: bool = False
    """Remove an earlier run in that directory."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default where the run found it."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""
    second_order: SecondOrder = field(default_factory=SecondOrder)
    """Settings of second-order targets such as o90."""
    layerwise: Layerwise = field(default_factory=Layerwise)
    """Settings of targets that look at layer inputs: w90, g90, rk90 and so on."""

    def check(self) -> None:
        """The target has a known name, and the run can be read."""
        targets.check(self.target)
        check_named(self.run, load_config(self.run), self.module)

    def execute(self) -> None:
        """Compresses, and stores the model."""
        start_jax()
        from experiments.commands.compress import compress

        compress(
            self.run,
            self.target,
            self.out,
            self.overwrite,
            self.data_dir,
            PrunerOptions(self.second_order, self.layerwise),
        )
