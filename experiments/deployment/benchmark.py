"""Engines side by side: time, size, difference from float32, and accuracy."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from experiments.deployment.engines import ENGINES, Deployment, Loaded
from experiments.deployment.network import Inputs, Network, Run, Subject
from experiments.deployment.peers import OnnxFiles
from experiments.deployment.timing import Times, measure

Pair: TypeAlias = tuple[str, str]
"""An engine and a target."""


@dataclass(frozen=True)
class Conduct:
    """How engines are compared.

    Attributes:
      engines: names in `ENGINES`.
      targets: what each network is compressed to.
      batches: sizes of a batch.
      threads: numbers of threads.
      rounds: measurements of each.
      calibration: training examples that INT8 is calibrated with.
      method: of our calibration, see `cram_jax.engine.Calibration`.
      judge: whether accuracy is measured.
      tune: whether our engine measures tiles first.
    """

    engines: tuple[str, ...] = tuple(ENGINES)
    targets: tuple[str, ...] = ("dense", "b90")
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    rounds: int = 9
    calibration: int = 1000
    method: str = "minmax"
    judge: bool = True
    tune: bool = False


class Row(NamedTuple):
    """One engine with one network.

    Attributes:
      engine: its name.
      target: what the network was compressed to.
      nbytes: on disk.
      difference: the largest difference from the float32 network, as a share of its
        largest output.
      accuracy: on the whole evaluation set, in %; None if it was not measured.
      times: CPU and wall time, by batch size and threads.
    """

    engine: str
    target: str
    nbytes: int
    difference: float
    accuracy: float | None
    times: dict[tuple[int, int], Times]


class Outcome(NamedTuple):
    """What a comparison found.

    Attributes:
      name: of the subject.
      metric: the name of the accuracies.
      exact: for every target, the accuracy of the float32 network in JAX, in %.
      rows: one for each engine and network.
    """

    name: str
    metric: str
    exact: dict[str, float | None]
    rows: list[Row]


def run_benchmark(
    subject: Subject, conduct: Conduct, say: Callable[[str], Any]
) -> Outcome:
    """Compares engines on a network and its compressed forms.

    Engines that multiply zeros run only the dense network, since the others would take
    the same time. If one of ours is included, so are the dense INT8 ones.

    Args:
      subject: the network and its examples.
      conduct: which engines, and how.
      say: told what is missing, and about progress.
    """
    calibration = subject.samples.calibration(conduct.calibration)
    deployments: dict[str, Deployment] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in dict.fromkeys(("dense", *conduct.targets)):
            place = Path(folder) / str(len(deployments))
            place.mkdir()
            deployments[target] = _deploy(subject, target, conduct, calibration, place)
        pairs = list(_pairs(conduct, is_text=len(calibration[0]) > 1))
        say(f"{subject.name}: compiling {len(pairs)} pairs of engine and target ...")
        loaded = _load(pairs, deployments, conduct, say)
        times = _times(loaded, conduct, subject, say)
        if conduct.judge:
            say(f"{subject.name}: evaluating each of them ...")
        return _judge(subject, conduct, deployments, loaded, times)


def _deploy(
    subject: Subject,
    target: str,
    conduct: Conduct,
    calibration: list[Inputs],
    folder: Path,
) -> Deployment:
    network = subject.compress(target)
    return Deployment(
        network,
        calibration,
        conduct.method,
        OnnxFiles(network.graph, calibration, folder),
        folder,
        subject.samples.inputs(conduct.batches[0]) if conduct.tune else None,
    )


def _pairs(conduct: Conduct, *, is_text: bool) -> Iterator[Pair]:
    """Engine and target; the dense INT8 ones are listed with ours."""
    engines = list(dict.fromkeys(conduct.engines))
    if any(ENGINES[name].skips_zeros for name in engines):
        dense = [n for n, i in ENGINES.items() if i.int8 and not i.skips_zeros]
        engines += [n for n in dense if n not in engines]
    for name in engines:
        info = ENGINES[name]
        if info.only_text and not is_text:
            continue
        for target in conduct.targets if info.skips_zeros else ("dense",):
            yield name, target


def _load(
    pairs: Sequence[Pair],
    deployments: dict[str, Deployment],
    conduct: Conduct,
    say: Callable[[str], Any],
) -> dict[Pair, dict[int, Loaded]]:
    loaded: dict[Pair, dict[int, Loaded]] = {}
    missing: dict[str, list[str]] = {}
    for name, target in pairs:
        info, deployment = ENGINES[name], deployments[target]
        try:
            loaded[name, target] = {
                threads: info.load(deployment, threads) for threads in conduct.threads
            }
        except ImportError as error:
            missing.setdefault(str(error), []).append(info.label)
    for reason, labels in missing.items():
        say(f"left out: {', '.join(dict.fromkeys(labels))} ({reason})")
    return loaded


def _times(
    loaded: dict[Pair, dict[int, Loaded]],
    conduct: Conduct,
    subject: Subject,
    say: Callable[[str], Any],
) -> dict[Pair, dict[tuple[int, int], Times]]:
    times: dict[Pair, dict[tuple[int, int], Times]] = {pair: {} for pair in loaded}
    for batch in conduct.batches:
        inputs = subject.samples.inputs(batch)
        for threads in conduct.threads:
            say(
                f"{subject.name}: {conduct.rounds} rounds of batch {batch}, "
                f"{threads} thread{'s' * (threads > 1)} ..."
            )
            runs = {pair: each[threads].bind(inputs) for pair, each in loaded.items()}
            for pair, measured in measure(runs, conduct.rounds).items():
                times[pair][batch, threads] = measured
    return times


def _judge(
    subject: Subject,
    conduct: Conduct,
    deployments: dict[str, Deployment],
    loaded: dict[Pair, dict[int, Loaded]],
    times: dict[Pair, dict[tuple[int, int], Times]],
) -> Outcome:
    inputs = subject.samples.inputs(conduct.batches[0])
    exact: dict[str, float | None] = {}
    rows: list[Row] = []
    for (name, target), by_threads in loaded.items():
        run = by_threads[conduct.threads[0]]
        forward = partial(_exact, deployments[target].network)
        if target not in exact:
            exact[target] = _score(subject, forward, conduct)
        rows.append(
            Row(
                name,
                target,
                run.nbytes,
                _difference(run(inputs), forward(inputs)),
                exact[target] if name == "jit" else _score(subject, run, conduct),
                times[name, target],
            )
        )
    return Outcome(subject.name, subject.samples.metric, exact, rows)


def _score(subject: Subject, run: Run, conduct: Conduct) -> float | None:
    score = subject.samples.score
    return score(run) if conduct.judge and score is not None else None


def _exact(network: Network, inputs: Inputs) -> np.ndarray:
    return np.asarray(network.forward(*inputs))


def _difference(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())
