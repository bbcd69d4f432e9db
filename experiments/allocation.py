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
from experiments.open_run import OpenRun

Measure = Literal["multiply_adds", "bytes"]

Compress = Callable[[str], Any]
"""From the name of a target to the dense network's parameters compressed to it."""

SPARSEST, MILDEST = 0.99, 0.4


class Weighed(NamedTuple):
    """What each parameter takes of a budget.

    Attributes:
      leaves: the parameters, by path.
      prices: what each takes dense; 0 if nothing.
      layers: paths of those that are pruned layer by layer.
      measure: what is budgeted.
    """

    leaves: dict[str, Any]
    prices: dict[str, float]
    layers: list[str]
    measure: Measure

    @property
    def total(self) -> float:
        """What the dense network takes."""
        return sum(self.prices.values())

    def taken(self, path: str, kept: float) -> float:
        """What a parameter takes with this share of its weights."""
        if self.measure == "multiply_adds":
            return self.prices[path] * kept
        # The values, and one bit for each weight; dense where that is less.
        bits = 8 * np.dtype(self.leaves[path].dtype).itemsize
        return self.prices[path] * min(1.0, kept + 1 / bits)


def weigh(run: OpenRun, measure: Measure) -> Weighed:
    """Counts what the parameters of a run take."""
    leaves = dict(named_leaves(run.params))
    chosen = cram_jax.prunable(run.params, run.task.filters.uniform)
    layers = [path for path, is_in in zip(leaves, chosen, strict=True) if is_in]
    if measure == "bytes":
        prices = {path: float(leaf.nbytes) for path, leaf in leaves.items()}
    else:
        counts = multiply_adds(
            lambda params, batch: run.task.predict(params, run.batch_stats, batch),
            run.params,
            run.data.train.take([0]),
        )
        prices = {path: float(counts.get(path, 0)) for path in leaves}
    return Weighed(leaves, prices, layers, measure)


def sparsities(count: int) -> np.ndarray:
    """Dense, then from 40 to 99 % zeros: the kept share falls by equal factors."""
    return 1 - np.r_[1.0, np.geomspace(1 - MILDEST, 1 - SPARSEST, count - 1)]


def uniform_target(weighed: Weighed, pruner: str, budget: float) -> str:
    """The target of that pruner that takes the budget, the same share of each layer."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        spent = sum(
            weighed.taken(path, 1 - middle if path in weighed.layers else 1.0)
            for path in weighed.leaves
        )
        low, high = (low, middle) if spent <= budget else (middle, high)
    if high > 0.9999:
        raise ConfigError(_too_small(weighed, budget))
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
        kept = shares(middle)
        spent = sum(weighed.taken(p, kept.get(p, 1.0)) for p in weighed.leaves)
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
        rest = weighed.total - sum(weighed.prices[path] for path in weighed.layers)
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
