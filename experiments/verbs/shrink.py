"""``shrink``: the channels of a target, cut out of a network."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.compression import targets
from experiments.errors import ConfigError
from experiments.runs.directory import load_config
from experiments.verbs.common import check_named, start_jax


@dataclass(frozen=True)
class Shrink:
    """Cut channels out of a trained model and store the smaller network as a run.

    It is a run like any other: evaluate it, export it, or train it further with
    ``train --config OUT/config.json --init-from OUT``.
    """

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    target: str
    """c50: 50 % of the channels of all layers together; of a BERT, of the heads and of
    the hidden units."""
    out: Path | None = None
    """Directory of the smaller network; by default RUN/compressed/TARGET-small."""
    overwrite: bool = False
    """Remove an earlier run in that directory."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default where the run found it."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""

    def check(self) -> None:
        """The target removes channels, and the run can be read."""
        if {part.form for part in targets.parse(self.target)} != {"channels"}:
            raise ConfigError(
                f"target must remove channels only, such as c50, got {self.target!r}: "
                f"other zeros do not make a network smaller"
            )
        check_named(self.run, load_config(self.run), self.module)

    def execute(self) -> None:
        """Shrinks, and stores the network."""
        start_jax()
        from experiments.commands.shrink import shrink_run

        out = self.out or self.run / "compressed" / f"{self.target}-small"
        shrink_run(self.run, self.target, out, self.overwrite, self.data_dir)
