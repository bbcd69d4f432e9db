"""Methods side by side: one budget of gradient evaluations, tuned alike.

Every knob is chosen on examples held out of the training set, from three values with
one seed each, for one target (for methods that serve all targets, by the mean over the
sparse ones). Then every method trains on all training examples, and is evaluated on the
test examples. A comparison that was stopped continues where it was.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from experiments.compression import targets
from experiments.config import RunConfig
from experiments.errors import ConfigError, NonFiniteLoss, RunError, Stopped
from experiments.evaluation.evaluation import Accuracy, evaluate_target, make_evaluation
from experiments.evaluation.results import (
    Results,
    add_run,
    load_results,
    new_results,
    save_results,
)
from experiments.kinds import prepare
from experiments.methods.bench import (
    METHODS,
    Entry,
    configured,
    trained_targets,
    tried_values,
    untuned,
)
from experiments.recipes import RECIPES
from experiments.runs import checkpoints
from experiments.runs.directory import locked, read_status, state_of, write_status
from experiments.runs.metrics import progress_bar
from experiments.task import Task
from experiments.training.loop import train
from experiments.training.step import init_state, make_train_step

RESULTS = "comparison.json"
SECONDS = "cpu_seconds"
"""In the status of a run, what its training has taken so far."""


class Bench(NamedTuple):
    """What a comparison is about; a stored one continues only if this is the same.

    Attributes:
      base: the recipe whose data, network and schedule all methods share.
      names: the targets.
      budget: evaluations of the gradient, in passes over the examples.
      held_out: training examples that knobs are chosen on; 0: each knob has the value
        of `untuned`.
      tuned_on: the target for which methods with a network for each target are tuned.
    """

    base: RunConfig
    names: tuple[str, ...]
    budget: int
    held_out: int
    tuned_on: str

    def stored(self) -> dict[str, Any]:
        """The same as JSON."""
        stored = {
            "task": self.base.name,
            "targets": list(self.names),
            "budget": self.budget,
            "held_out": self.held_out,
            "tuned_on": self.tuned_on,
        }
        rate = self.base.optimizer.learning_rate
        recipe = RECIPES.get(self.base.name)
        changed = {
            "weights": getattr(self.base, "weights", None),
            "init_from": self.base.init_from,
            "learning_rate": rate
            if recipe and rate != recipe.optimizer.learning_rate
            else None,
        }
        return stored | {name: value for name, value in changed.items() if value}


class Trained(NamedTuple):
    """A model that was trained and evaluated.

    Attributes:
      accuracies: of its targets.
      zeros: the share of zeros among the prunable weights, as it was trained.
      seconds: CPU time of the training.
    """

    accuracies: list[Accuracy]
    zeros: float
    seconds: float


def compare(
    bench: Bench,
    methods: Sequence[str],
    seeds: int,
    out: Path,
    console: Console,
    *,
    data_dir: Path | None = None,
) -> Results:
    """Tunes and trains what is not stored yet, and stores each result at once.

    Args:
      bench: the task.
      methods: of `METHODS`.
      seeds: runs of every method.
      out: a directory for comparison.json and the runs. Several processes may share
        it, each with methods of its own.
      console: where to report progress.
      data_dir: where the prepared data are kept.

    Returns:
      The results: for every method the runs of `add_run`, each with what its network
      was ``trained_for``, its share of ``zeros`` and its ``knob``; those that
      ``diverged``; its ``search``; and its ``cost``.
    """
    path = out / RESULTS
    results = _stored(path, bench)
    for method in methods:
        own = results["methods"].setdefault(method, {"runs": [], "search": []})
        own.setdefault("diverged", [])
    with progress_bar(console) as progress:
        models = progress.add_task("models", total=None, note="")
        runner = _Runner(bench, out, progress, data_dir)
        held_out = _Runner(_holding_out(bench), out, progress, data_dir)
        steps = [
            *_searches(bench, methods, results, held_out),
            *_trainings(bench, methods, seeds, results, runner),
        ]
        progress.update(models, total=len(steps))
        for name, step in steps:
            start = time.perf_counter()
            try:
                step()
            except Stopped as stopped:
                raise Stopped(
                    f"stopped in {name}; run the same command to continue",
                    stopped.signal,
                ) from stopped
            _store(results, path, bench, methods, time.perf_counter() - start)
            progress.update(models, advance=1)
            console.print(f"{name}: {time.perf_counter() - start:.0f} s")
    return results


def _stored(path: Path, bench: Bench) -> Results:
    """Results to continue with, or new ones."""
    if not path.exists():
        return new_results(bench.names) | {"bench": bench.stored()}
    results = load_results(path)
    if results.get("bench") != bench.stored():
        raise ConfigError(
            f"{path} holds another comparison, {results.get('bench')}, expected "
            f"{bench.stored()}; choose another --out"
        )
    return results


def _store(
    results: Results, path: Path, bench: Bench, methods: Sequence[str], seconds: float
) -> None:
    """Saves the results, with what other processes found about other methods."""
    with locked(path.parent, waits=True):
        stored = _stored(path, bench)
        others = {m: own for m, own in stored["methods"].items() if m not in methods}
        results["methods"].update(others)
        results["seconds"] = round(stored["seconds"] + seconds, 1)
        save_results(results, path, indent=None)


def _searches(
    bench: Bench, methods: Sequence[str], results: Results, runner: "_Runner"
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is to be tuned."""
    if not bench.held_out:
        return
    for method in methods:
        entry = METHODS[method]
        search = results["methods"][method]["search"]
        known = [found["value"] for found in search]
        fitting = trained_targets(entry, (bench.tuned_on, *bench.names))
        for value in tried_values(entry, bench.base):
            if value in known or not fitting:
                continue

            def step(
                entry: Entry = entry,
                target: str | None = fitting[0],
                value: float = value,
                search: list[dict[str, float]] = search,
                method: str = method,
            ) -> None:
                try:
                    found = runner.run(entry, target, value, 0, f"search-{method}")
                    score = _score(found.accuracies)
                except NonFiniteLoss:
                    score = 0.0
                search.append({"value": value, "score": score})

            yield f"{method}, {entry.knob} {value:g}, on held-out examples", step


def _score(accuracies: Sequence[Accuracy]) -> float:
    """The mean over the targets that prune all weights, including dense, if any."""
    zeros = [a for a in accuracies if targets.sparsity(a.target) is not None]
    return float(np.mean([accuracy.judged for accuracy in zeros or accuracies]))


def chosen_value(
    entry: Entry, search: Sequence[dict[str, float]], base: RunConfig
) -> float:
    """The best value of the knob; if none was tried, see `untuned`."""
    if not search:
        return untuned(entry, base)
    return max(search, key=lambda found: found["score"])["value"]


def _trainings(
    bench: Bench,
    methods: Sequence[str],
    seeds: int,
    results: Results,
    runner: "_Runner",
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is to be trained: one seed of everything, then the next."""
    for seed in range(seeds):
        for method in methods:
            entry, own = METHODS[method], results["methods"][method]
            ended = [*own["runs"], *own["diverged"]]
            done = [(run["trained_for"], run["seed"]) for run in ended]
            for target in trained_targets(entry, bench.names):
                if (target, seed) in done:
                    continue

                def step(
                    entry: Entry = entry,
                    target: str | None = target,
                    seed: int = seed,
                    own: dict[str, Any] = own,
                    method: str = method,
                ) -> None:
                    value = chosen_value(entry, own["search"], bench.base)
                    config = runner.config(entry, target, value, seed)
                    _check_examples(results, runner.examples)
                    if "cost" not in own:
                        own["cost"] = runner.cost(entry, config)
                    try:
                        found = runner.run(entry, target, value, seed, method)
                    except NonFiniteLoss:
                        own["diverged"].append({"trained_for": target, "seed": seed})
                        return
                    results["metric"] = runner.metric
                    add_run(results, method, config, found.accuracies, found.seconds)
                    own["runs"][-1] |= {
                        "trained_for": target,
                        "zeros": found.zeros,
                        "knob": value,
                        "examples": runner.examples,
                    }

                yield f"{method} for {target or 'all'}, seed {seed}", step


def _check_examples(results: Results, examples: int) -> None:
    """Raises if means would be over runs on fewer and on more training examples."""
    for own in results["methods"].values():
        for run in own["runs"]:
            if run.get("examples", examples) != examples:
                raise ConfigError(
                    f"this comparison has runs on {run['examples']} training examples, "
                    f"and there are {examples} now; choose another --out"
                )


class _Runner:
    """Trains and evaluates models of one data set; programs are compiled once."""

    def __init__(
        self, bench: Bench, out: Path, progress: Progress, data_dir: Path | None
    ):
        self._bench, self._out, self._progress = bench, out, progress
        self._data_dir = data_dir
        self._prepared: tuple[Any, Task] | None = None
        self._evaluation: Any = None
        self._steps: dict[RunConfig, Any] = {}

    def config(
        self, entry: Entry, target: str | None, value: float, seed: int
    ) -> RunConfig:
        """Of a run."""
        config = configured(
            self._bench.base,
            entry,
            target,
            self._bench.names,
            budget=self._bench.budget,
            value=value,
        )
        return dataclasses.replace(config, seed=seed)

    @property
    def metric(self) -> str:
        """The main metric of the task."""
        return self._data()[1].metric

    @property
    def examples(self) -> int:
        """How many there are to train on."""
        size: int = self._data()[0].train.size
        return size

    def run(
        self, entry: Entry, target: str | None, value: float, seed: int, word: str
    ) -> Trained:
        """Trains, or resumes, and evaluates."""
        config = self.config(entry, target, value, seed)
        data, task = self._data()
        run = self._out / "runs" / f"{word}-{config.name}-{value:g}-seed{seed}"
        goes_on = run.exists() and checkpoints.latest_step(run) is not None
        before = read_status(run).get(SECONDS, 0.0) if goes_on else 0.0
        start = time.process_time() - before
        try:
            state = train(
                config,
                run,
                data,
                task,
                self._progress,
                train_step=self._step(config),
                resume=goes_on,
                overwrite=True,
            )
        except Stopped:
            write_status(run, **{SECONDS: time.process_time() - start})
            raise
        if problem := state_of(run):
            raise RunError(f"{run}: {problem}")
        seconds = time.process_time() - start
        write_status(run, **{SECONDS: seconds})  # the evaluation may be stopped, too
        model = state.judged, state.batch_stats
        accuracies = [
            evaluate_target(self._evaluation, *model, name)
            for name in config.eval_targets
        ]
        shutil.rmtree(run)  # the numbers are what is kept
        return Trained(accuracies, task.zeros(state.judged), seconds)

    def cost(self, entry: Entry, config: RunConfig) -> dict[str, float]:
        """What a step needs apart from time.

        Returns:
          ``evaluations`` of the gradient a step; ``state`` of the optimiser, in copies
          of the parameters; ``memory``, in MiB, that the compiled step holds at most.
        """
        data, task = self._data()
        state = jax.eval_shape(partial(init_state, config, data, task))
        batch = next(iter(data.train.training_batches(config.data.batch_size, 0, 0, 1)))
        compiled = self._step(config).lower(state, batch).compile()
        memory = compiled.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return {
            "evaluations": entry.evaluations,
            "state": _size(state.opt_state) / _size(state.params),
            "memory": peak / 2**20,
        }

    def _step(self, config: RunConfig) -> Any:
        data, task = self._data()
        key = dataclasses.replace(config, seed=0)
        if key not in self._steps:
            self._steps[key] = make_train_step(config, data, task)
        return self._steps[key]

    def _data(self) -> tuple[Any, Task]:
        if self._prepared is None:
            base = self._bench.base
            self._prepared = prepare(base, self._data_dir)
            self._evaluation = make_evaluation(base, *self._prepared)
        return self._prepared


def _holding_out(bench: Bench) -> Bench:
    if not bench.held_out:
        return bench
    data = dataclasses.replace(bench.base.data, validation=bench.held_out)
    return bench._replace(base=dataclasses.replace(bench.base, data=data))


def _size(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
