"""``compare``: many methods, one budget, one table."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from experiments.compression import targets
from experiments.config import RunConfig, variant
from experiments.errors import ConfigError
from experiments.methods.bench import MAIN, METHODS, check_methods
from experiments.runs.directory import starting_from
from experiments.text.config import TextConfig
from experiments.verbs.common import check_named, recipe_named, start_jax

HELD_OUT = {"digits": 300, "cifar10": 5000, "sst2": 1000}
"""Training examples that knobs are tuned on, by the name of the data."""


@dataclass(frozen=True)
class Compare:
    """Train many pruning methods on one budget of gradient evaluations; one table.

    If it is stopped, the same command continues; more methods or seeds are added to the
    results. Several processes with different methods may share the work. Methods that
    make one network for one target train one for each.
    """

    task: str = "digits"
    """The recipe whose data, network and schedule all methods share."""
    methods: tuple[str, ...] = ()
    """Which methods; by default all on digits, and the eight that matter most on data
    where a training takes longer."""
    targets: tuple[str, ...] = (
        "dense",
        "k50",
        "k80",
        "k90",
        "k95",
        "2:4",
        "b80",
        "4bit",
    )
    """The targets to evaluate."""
    seeds: int = 3
    """Runs of every method."""
    budget: int | None = None
    """Gradient evaluations in passes over the examples; by default twice the epochs of
    the recipe, what its CrAM+ spends."""
    tuned_on: str = "k90"
    """The target for which the knob of methods with a network for each is chosen."""
    tune: bool = True
    """Tune knobs on held-out examples. Untuned, those that the recipe sets have its
    values, and others the second that would be tried."""
    held_out: int | None = None
    """How many training examples to hold out for that; by default as many as the run
    that methods start from, 300 of digits, 5,000 of CIFAR-10, 1,000 of SST-2. Of other
    data none: nothing is tuned."""
    out: Path | None = None
    """Where results go; by default runs/compare-TASK, with -from-RUN after it."""
    weights: str | None = None
    """Of text: the directory of a BERT as Hugging Face stores it, to start from."""
    init_from: Path | None = None
    """A run whose network, data and trained weights all methods start from."""
    learning_rate: float | None = None
    """By default the recipe's."""
    data_dir: Path | None = None
    """Where the prepared data are kept; by default the user's cache."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""

    def check(self) -> None:
        """The task, methods and targets are known."""
        base = self._base()
        if self.init_from is not None:
            check_named(self.init_from, base, self.module)
        self._check_data(base)
        check_methods(self._methods())
        for name in (*self.targets, self.tuned_on):
            targets.check(name)
        trained = [name for name in self.targets if name != "dense"]
        for method in self._methods():
            if METHODS[method].trains_for_all and not trained:
                raise ConfigError(
                    f"targets must be more than dense for the method {method}, got "
                    f"{', '.join(self.targets)}"
                )
            for name in trained if METHODS[method].trains_for_all else ():
                targets.check(name, training=True)
        if self.held_out is not None and self.held_out < 0:
            raise ConfigError(f"held_out must be at least 0, got {self.held_out}")
        for name, value in (("seeds", self.seeds), ("budget", self.budget)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")

    def execute(self) -> None:
        """Tunes, trains, judges; prints the table."""
        start_jax()
        from experiments.comparison import Bench, compare
        from experiments.kinds import kind_of
        from experiments.reports import comparison as report
        from experiments.runs.metrics import make_console

        base = kind_of(self._base()).resolve(self._base())
        held_out = self._held_out(base)
        if self.init_from and base.data.validation < held_out:
            print(f"note: {self.init_from} has seen examples that knobs are tuned on")
        bench = Bench(
            _on_all(base),
            self.targets,
            self.budget or 2 * base.epochs,
            held_out,
            self.tuned_on,
        )
        start = f"-from-{self.init_from.name}" if self.init_from else ""
        out = self.out or Path("runs") / f"compare-{self.task}{start}"
        console = make_console()
        results = compare(
            bench, self._methods(), self.seeds, out, console, data_dir=self.data_dir
        )
        seeds = len({r["seed"] for m in results["methods"].values() for r in m["runs"]})
        title = (
            f"{base.model.title} on {base.data.name}, {bench.budget} passes of "
            f"gradients, {seeds} seeds, {results['metric']} (%)"
        )
        console.print(report.table(results, title))
        report.store(results, out, title)
        console.print(f"Table, picture and numbers: {out}", soft_wrap=True)

    def _check_data(self, base: RunConfig) -> None:
        """Raises unless there are examples to train on, and others to test on."""
        own = recipe_named(self.task).data.name in ("folder", "file")
        if own and self.init_from is None:
            raise ConfigError(
                f"{self.task} reads data of your own: name a run on them with "
                f"--init-from"
            )
        base.check_inputs()
        try:
            _on_all(base).check_inputs()
        except ConfigError as error:
            raise ConfigError(
                f"init_from must be a run with test examples of its own, as methods "
                f"train on all training examples, got {self.init_from}"
            ) from error

    def _held_out(self, base: RunConfig) -> int:
        """How many examples knobs are tuned on."""
        if not self.tune:
            return 0
        if self.held_out is not None:
            return self.held_out
        return base.data.validation or HELD_OUT.get(base.data.name, 0)

    def _base(self) -> RunConfig:
        base = recipe_named(self.task)
        if self.learning_rate is not None:
            base = variant(base, base.name, learning_rate=self.learning_rate)
        if self.init_from is not None:
            base = starting_from(base, self.init_from)
        if self.weights is None:
            return base
        if not isinstance(base, TextConfig):
            raise ConfigError(f"weights are for tasks on text, got {self.task!r}")
        return dataclasses.replace(base, weights=self.weights)

    def _methods(self) -> tuple[str, ...]:
        every = recipe_named(self.task).data.name == "digits"
        return self.methods or (tuple(METHODS) if every else MAIN)


def _on_all(base: RunConfig) -> RunConfig:
    """Without held-out examples."""
    data = dataclasses.replace(base.data, validation=0)
    return dataclasses.replace(base, data=data)
