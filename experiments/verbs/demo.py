"""``demo``: the main job on a small scale."""

from dataclasses import dataclass
from pathlib import Path

from experiments.verbs.common import start_jax


@dataclass(frozen=True)
class Demo:
    """Train SGD, SAM and CrAM+ on digits, prune, compare: about three minutes."""

    run: Path = Path("runs/demo")
    """Where results, picture and models go."""
    seeds: int = 3
    """Runs of every method."""
    epochs: int | None = None
    """Epochs of CrAM+ and SAM (SGD trains twice as long); by default the recipe's."""
    data_dir: Path | None = None
    """Where the prepared data are kept; by default the user's cache."""

    def check(self) -> None:
        """Nothing is checked: errors show at once."""

    def execute(self) -> None:
        """Trains, prunes and compares."""
        start_jax()
        from experiments.demo import demo
        from experiments.runs.metrics import make_console

        demo(
            self.run,
            self.seeds,
            make_console(),
            epochs=self.epochs,
            data_dir=self.data_dir,
        )
