"""Engines beside each other: time, size, difference from float32, and accuracy."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.deployment.engines import ENGINES, Deployment, Loaded
from experiments.deployment.network import Inputs, Network, Subject
from experiments.deployment.peers import OnnxFiles
from experiments.deployment.timing import Times, measure


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
      judge: whether the accuracy is measured.
      tune: whether our engine measures tiles first.
    """

    engines: tuple[str, ...] = tuple(ENGINES)
    targets: tuple[str, ...] = ("dense", "b90")
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    rounds: int = 9
    calibration: int = 256
    method: str = "minmax"
    judge: bool = True
    tune: bool = False


class Row(NamedTuple):
    """One engine with one network.

    Attributes:
      engine: its name.
      target: what the network was compressed to.
      nbytes: on disk.
      difference: the largest from the float32 network, over its largest output.
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
      metric: what the accuracies are.
      exact: for every target the accuracy of the float32 network in JAX, in %.
      rows: one an engine and network.
    """

    name: str
    metric: str
    exact: dict[str, float | None]
    rows: list[Row]


def run_benchmark(
    subject: Subject, conduct: Conduct, say: Callable[[str], Any]
) -> Outcome:
    """Compares engines on a network and its compressed forms.

    Engines that multiply zeros run the dense network only, since the others would take
    them the same time. If one of ours is there, the dense INT8 ones are, too.

    Args:
      subject: the network and its examples.
      conduct: which engines, and how.
      say: told what is missing, and how far it is.
    """
    samples = subject.samples
    calibration = samples.calibration(conduct.calibration)
    with tempfile.TemporaryDirectory() as folder:
        deployments = {}
        for target in dict.fromkeys(("dense", *conduct.targets)):
            place = Path(folder) / target.replace("+", "-").replace(":", "-")
            place.mkdir()
            network = subject.compress(target)
            deployments[target] = Deployment(
                network,
                calibration,
                conduct.method,
                OnnxFiles(network.graph, calibration, place),
                place,
                samples.inputs(conduct.batches[0]) if conduct.tune else None,
            )
        is_text = len(calibration[0]) > 1
        pairs = list(_pairs(conduct, is_text))
        loaded = _load(pairs, deployments, conduct.threads, say)
    times = _times(loaded, conduct, subject, say)
    exact: dict[str, float | None] = {}
    rows = []
    for pair in loaded:
        engine, target = pair
        network, first = deployments[target].network, loaded[pair][conduct.threads[0]]
        if target not in exact:
            exact[target] = _score(subject, lambda x, n=network: _exact(n, x), conduct)
        is_exact = engine == "jit"
        rows.append(
            Row(
                engine,
                target,
                first.nbytes,
                _difference(first, network, samples.inputs(conduct.batches[0])),
                exact[target] if is_exact else _score(subject, first, conduct),
                times[pair],
            )
        )
        say(f"{ENGINES[engine].label}, {target}: judged")
    return Outcome(subject.name, samples.metric, exact, rows)


Pair = tuple[str, str]


def _pairs(conduct: Conduct, is_text: bool) -> Iterator[Pair]:
    """Engine and target; the dense INT8 ones stand beside ours."""
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
    threads: Sequence[int],
    say: Callable[[str], Any],
) -> dict[Pair, dict[int, Loaded]]:
    loaded: dict[Pair, dict[int, Loaded]] = {}
    missing: set[str] = set()
    for name, target in pairs:
        load = ENGINES[name].load
        try:
            loaded[name, target] = {t: load(deployments[target], t) for t in threads}
        except ImportError as error:
            if name not in missing:
                say(f"{ENGINES[name].label} is left out: {error}")
            missing.add(name)
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
            say(f"batch {batch}, threads {threads}: {conduct.rounds} rounds ...")
            runs = {
                "\t".join(pair): each[threads].bind(inputs)
                for pair, each in loaded.items()
            }
            for key, measured in measure(runs, conduct.rounds).items():
                name, target = key.split("\t")
                times[name, target][batch, threads] = measured
    return times


def _score(subject: Subject, run: Any, conduct: Conduct) -> float | None:
    score = subject.samples.score
    return score(run) if conduct.judge and score is not None else None


def _exact(network: Network, inputs: Inputs) -> np.ndarray:
    return np.asarray(network.forward(*inputs))


def _difference(loaded: Loaded, network: Network, inputs: Inputs) -> float:
    exact = _exact(network, inputs)
    return float(np.abs(loaded(inputs) - exact).max() / np.abs(exact).max())
