"""A sparsity for each layer under a budget: SPDY for a trained run."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import cram_jax
from cram_jax import layerwise
from cram_jax.paths import named_leaves
from cram_jax.structure import multiply_adds
from experiments.errors import ConfigError
from experiments.evaluation.open_run import OpenRun
from experiments.kinds import kind_of

Measure = Literal["multiply_adds", "bytes", "seconds"]

Compress = Callable[[str], Any]
"""From the name of a target to the dense network's parameters compressed to it."""

SPARSEST, MILDEST = 0.99, 0.4


class Weighed(NamedTuple):
    """How much of a budget each parameter takes.

    Attributes:
      leaves: the parameters, by path.
      curves: by path, shares of weights kept, from 0 to 1, and the cost of the
        parameter at each.
      rest: what the network takes apart from its parameters.
      layers: paths of those that are pruned layer by layer.
      measure: what is budgeted.
    """

    leaves: dict[str, Any]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    rest: float
    layers: list[str]
    measure: Measure

    @property
    def total(self) -> float:
        """What the dense network takes."""
        return self.rest + sum(self.taken(path, 1.0) for path in self.leaves)

    def taken(self, path: str, kept: float) -> float:
        """What a parameter takes with this share of its weights."""
        return float(np.interp(kept, *self.curves[path]))

    def spent(self, kept: dict[str, float]) -> float:
        """What the network takes with these shares; parameters not named are dense."""
        return self.rest + sum(self.taken(p, kept.get(p, 1.0)) for p in self.leaves)


def weigh(run: OpenRun, measure: Measure, compress: Compress, pruner: str) -> Weighed:
    """Counts or measures what the parameters of a run take.

    Args:
      run: with the dense network.
      measure: what is budgeted.
      compress: of the dense network; what is timed are networks pruned like it.
      pruner: the target's letters before the sparsity.
    """
    leaves = dict(named_leaves(run.params))
    chosen = cram_jax.prunable(run.params, run.task.filters.uniform)
    layers = [path for path, is_in in zip(leaves, chosen, strict=True) if is_in]
    if measure == "seconds":
        curves, rest = _timed(run, compress, pruner)
        nothing = np.array([0.0, 1.0]), np.zeros(2)
        curves = {path: curves.get(path, nothing) for path in leaves}
        return Weighed(leaves, curves, rest, layers, measure)
    if measure == "multiply_adds":
        counts = multiply_adds(
            lambda params, batch: run.task.predict(params, run.batch_stats, batch),
            run.params,
            run.data.train.take([0]),
        )
        curves = {
            path: (np.array([0.0, 1.0]), np.array([0.0, counts.get(path, 0)]))
            for path in leaves
        }
    else:
        curves = {path: _packed(leaf) for path, leaf in leaves.items()}
    return Weighed(leaves, curves, 0.0, layers, measure)


def _packed(leaf: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the values and one bit for each weight; dense if that is less."""
    bit = 1 / (8 * np.dtype(leaf.dtype).itemsize)
    return np.array([0, 1 - bit, 1]), leaf.nbytes * np.array([bit, 1, 1])


TIMED = (0.0, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Sparsities at which layers are timed."""


def _timed(
    run: OpenRun, compress: Compress, pruner: str
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """Seconds of each layer in our engine, one example a call, and of the rest."""
    dense = layer_seconds(run, run.params)
    times: dict[str, list[float]] = {path: [dense[path]] for path in dense if path}
    for share in TIMED[1:]:
        seconds = layer_seconds(run, compress(f"{pruner}{100 * share:.6f}"))
        for path, entries in times.items():
            # Fewer weights cannot take longer; if they seem to, it is noise.
            entries.append(min(seconds[path], entries[-1]))
    kept = 1 - np.array(TIMED[::-1])
    curves = {path: (kept, np.array(own[::-1])) for path, own in times.items()}
    return curves, dense[""]


def layer_seconds(run: OpenRun, params: Any) -> dict[str, float]:
    """Seconds of each kernel in a call with one example; of the rest at ``""``."""
    from cram_jax import engine

    kind = kind_of(run.config)
    network = kind.deploy(run.config, run.data, params, run.batch_stats)
    inputs = kind.samples(run.config, run.data).inputs(1)
    profile = engine.compile(network.graph).profile(*inputs, repeats=20)
    seconds = {entry.name: entry.seconds for entry in profile}
    readers = {name: node.name for node in network.graph.nodes for name in node.inputs}
    found: dict[str, float] = {}
    left = list(network.graph.nodes)
    for path, leaf in named_leaves(params):
        for node in left:
            kernel = getattr(node.operation, "kernel", None)
            if kernel is not None and np.array_equal(kernel, leaf):
                # A fused node has the name of the last of its parts.
                name = node.name
                while name not in seconds:
                    name = readers[name]
                found[path] = seconds[name]
                left.remove(node)
                break
    return found | {"": sum(seconds.values()) - sum(found.values())}


def sparsities(count: int) -> np.ndarray:
    """Dense, then from 40 to 99 % zeros: the kept share falls by equal factors."""
    return 1 - np.r_[1.0, np.geomspace(1 - MILDEST, 1 - SPARSEST, count - 1)]


def uniform_target(weighed: Weighed, pruner: str, budget: float) -> str:
    """The target of that pruner that takes the budget, the same share of each layer.

    Raises:
      ConfigError: no network does, as no layer loses more than `SPARSEST`.
    """
    if weighed.spent(dict.fromkeys(weighed.layers, 1 - SPARSEST)) > budget:
        raise ConfigError(_too_small(weighed, budget))
    low, high = 0.0, SPARSEST
    for _ in range(40):
        middle = (low + high) / 2
        spent = weighed.spent(dict.fromkeys(weighed.layers, 1 - middle))
        low, high = (low, middle) if spent <= budget else (middle, high)
    return f"{pruner}{100 * high:.6f}"


def global_target(weighed: Weighed, pruner: str, budget: float, where: Any) -> str:
    """The target with one threshold for all weights that takes the budget."""
    leaves = list(weighed.leaves.items())
    tree = dict(leaves)
    chosen = cram_jax.prunable(tree, where)
    pruned = [path for (path, _), is_in in zip(leaves, chosen, strict=True) if is_in]
    magnitudes = {path: np.sort(np.abs(tree[path]).ravel()) for path in pruned}
    low, high = 0.0, max(float(values[-1]) for values in magnitudes.values())

    def shares(threshold: float) -> dict[str, float]:
        return {
            path: 1 - np.searchsorted(values, threshold) / len(values)
            for path, values in magnitudes.items()
        }

    for _ in range(60):
        middle = (low + high) / 2
        spent = weighed.spent(shares(middle))
        low, high = (low, middle) if spent <= budget else (middle, high)
    size = sum(map(len, magnitudes.values()))
    kept = shares(high)
    left = sum(kept[path] * len(values) for path, values in magnitudes.items())
    if left < 1:
        raise ConfigError(_too_small(weighed, budget))
    return f"{pruner}{100 * (1 - left / size):.6f}"


class Database:
    """The layers of a network at every level of sparsity, and what levels score.

    Args:
      run: with the dense network.
      weighed: its layers.
      compress: of the dense network.
      pruner: the target's letters before the sparsity, such as ``ru``.
      levels: how many sparsities there are.
      examples: training examples that choices are scored with.
    """

    def __init__(
        self,
        run: OpenRun,
        weighed: Weighed,
        compress: Compress,
        pruner: str,
        levels: int,
        examples: int,
    ) -> None:
        self.run, self.weighed = run, weighed
        self.sparsities = sparsities(levels)
        names = ["dense", *(f"{pruner}{100 * s:.6f}" for s in self.sparsities[1:])]
        self.layers: dict[str, list[np.ndarray]] = {p: [] for p in weighed.layers}
        for name in names:
            found = dict(named_leaves(compress(name)))
            for path, entries in self.layers.items():
                entries.append(np.asarray(found[path]))
        self.times = np.array(
            [
                [weighed.taken(path, 1 - share) for share in self.sparsities]
                for path in weighed.layers
            ]
        )
        count = min(examples, run.data.train.size)
        drawn = np.random.default_rng(1).permutation(run.data.train.size)[:count]
        self.batch = run.data.train.take(np.sort(drawn))
        self._loss = jax.jit(run.task.evaluation_loss)

    def stitched(self, levels: np.ndarray) -> Any:
        """The network with each layer at its level."""
        leaves = dict(self.weighed.leaves)
        for path, level in zip(self.weighed.layers, levels.tolist(), strict=True):
            leaves[path] = self.layers[path][level]
        structure: Any = jax.tree.structure(self.run.params)
        return structure.unflatten(list(leaves.values()))

    def score(self, levels: np.ndarray) -> float:
        """The loss of that network."""
        loss = self._loss(self.stitched(levels), self.run.batch_stats, self.batch)
        return float(loss)

    def allocate(self, budget: float, seed: int, starts: int) -> np.ndarray:
        """The levels that SPDY finds for a budget of the whole network."""
        weighed = self.weighed
        rest = weighed.spent(dict.fromkeys(weighed.layers, 0.0)) - sum(
            weighed.taken(path, 0.0) for path in weighed.layers
        )
        if budget - rest < self.times.min(axis=1).sum():
            raise ConfigError(_too_small(weighed, budget))
        rank = np.arange(len(self.sparsities)) / (len(self.sparsities) - 1)
        return layerwise.search(
            self.score,
            np.tile(rank**2, (len(self.times), 1)),
            self.times,
            budget - rest,
            seed=seed,
            starts=starts,
            failures=starts,
            buckets=2000,
        )


def _too_small(weighed: Weighed, budget: float) -> str:
    return (
        f"speedup must be smaller: {weighed.total / budget:.2f} times fewer "
        f"{weighed.measure.replace('_', '-')} cannot be reached with at most "
        f"{100 * SPARSEST:g} % zeros in the layers that are pruned"
    )
