"""One model, many targets: accuracy as pruned and after recalibration."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import cram_jax
from experiments.batches import Batch, Source
from experiments.compression.options import PrunerOptions
from experiments.compression.pruners import AbstractPruners, TrainedPruners
from experiments.compression.targets import needs_data, parse, projector, sparsity
from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.images.data import Dataset
from experiments.task import Task


class Accuracy(NamedTuple):
    """Accuracy of one model on one target, in percent, or the metric of its task.

    Attributes:
      target: its name, such as ``k90``.
      pruned: with the statistics of the dense model.
      recalibrated: with batch-norm statistics of the compressed one; the mean if there
        are several draws of calibration images. None without batch norm.
      draws: recalibrated, for every draw.
      metrics: all that the task measures, pruned.
    """

    target: str
    pruned: float
    recalibrated: float | None
    draws: tuple[float, ...] = ()
    metrics: Mapping[str, float] | None = None

    @property
    def judged(self) -> float:
        """What counts: recalibrated if there is batch norm, else pruned."""
        return self.pruned if self.recalibrated is None else self.recalibrated


class Evaluation(NamedTuple):
    """Compiled functions, shared by all models of one shape.

    Attributes:
      compress: ``(params, target, batch_stats=None) -> Projection``, in one shot;
        targets that look at the data need the statistics, if there are any.
      recalibrate: ``(params, batch_stats, draw=0) -> batch_stats``, on a random draw of
        training images, by its number, augmented as in training.
      metrics: ``(params, batch_stats) -> {...}``, all that the task measures.
      metric: the main one.
    """

    compress: Callable[..., cram_jax.Projection]
    recalibrate: Callable[..., Any]
    metrics: Callable[[Any, Any], dict[str, float]]
    metric: str

    def accuracy(self, params: Any, batch_stats: Any) -> float:
        """The main metric, in percent."""
        return self.metrics(params, batch_stats)[self.metric]


def make_evaluation(
    config: RunConfig,
    data: Dataset,
    task: Task,
    pruning: PrunerOptions | None = None,
) -> Evaluation:
    """Prepares an evaluation.

    Args:
      config: sizes of the batches, number of calibration images.
      data: calibration images, and the examples that pruning looks at, come from
        ``train``; models are evaluated on ``evaluation``.
      task: the model.
      pruning: settings of pruning that needs data.

    Returns:
      The functions; each compiles at first use.
    """
    pruners: list[TrainedPruners] = []  # for the model that was compressed last

    def pruners_of(params: Any, batch_stats: Any) -> TrainedPruners:
        if not pruners or pruners[0].params is not params:
            options = pruning or PrunerOptions()
            made = TrainedPruners(task, data.train, params, batch_stats, options)
            pruners[:] = [made]
        return pruners[0]

    compiled_compress = jax.jit(cram_jax.compress, static_argnames="projector")

    @partial(jax.jit, static_argnames="scope")
    def prune(params: Any, share: float, scope: Any) -> cram_jax.Projection:
        """One compilation for every sparsity."""
        filters = task.filters
        where = filters.prunable if scope == "global" else filters.uniform
        chosen = cram_jax.top_k(share, scope=scope, where=where)
        return cram_jax.compress(params, chosen)

    def compress(
        params: Any, target: str, batch_stats: Any = None
    ) -> cram_jax.Projection:
        for scope in ("global", "layer"):
            share = sparsity(target, scope)
            if share is not None:
                return prune(params, share, scope)
        if needs_data(target):  # it holds arrays, and compiles its own steps
            own = pruners_of(params, batch_stats)
            chosen = projector(target, filters=task.filters, pruners=own)
            return cram_jax.compress(params, chosen)
        chosen = projector(target, filters=task.filters)
        return compiled_compress(params, projector=chosen)

    @jax.jit
    def training_pass(
        params: Any, batch_stats: Any, drawn: tuple[jax.Array, Batch]
    ) -> Any:
        """Of images augmented as in training: plain ones have different statistics."""
        return task.loss_fn(params, batch_stats, task.augment(*drawn))[1]

    def recalibrate(params: Any, batch_stats: Any, draw: int = 0) -> Any:
        if not has_statistics(batch_stats):
            return batch_stats
        return cram_jax.recalibrate(
            partial(training_pass, params),
            batch_stats,
            _calibration_batches(config, data.train, draw),
        )

    def metrics(params: Any, batch_stats: Any) -> dict[str, float]:
        return task.evaluate(params, batch_stats, data.evaluation)

    return Evaluation(compress, recalibrate, metrics, task.metric)


def evaluate_target(
    evaluation: Evaluation,
    params: Any,
    batch_stats: Any,
    target: str,
    calibrations: int = 1,
) -> Accuracy:
    """Compresses a model and evaluates it, before and after recalibration.

    Args:
      evaluation: from `make_evaluation`.
      params: of the dense model.
      batch_stats: of the dense model.
      target: its name.
      calibrations: random draws of calibration images, the same for every model.
    """
    compressed = evaluation.compress(params, target, batch_stats).params
    metrics = evaluation.metrics(compressed, batch_stats)
    pruned = metrics[evaluation.metric]
    if not has_statistics(batch_stats):
        return Accuracy(target, pruned, None, metrics=metrics)
    draws = tuple(
        evaluation.accuracy(
            compressed, evaluation.recalibrate(compressed, batch_stats, draw)
        )
        for draw in range(calibrations)
    )
    return Accuracy(target, pruned, float(np.mean(draws)), draws, metrics)


def check_targets(names: tuple[str, ...], config: RunConfig, task: Task) -> None:
    """Raises if a target fits no layer of a network; nothing is computed.

    Raises:
      ConfigError: it names the target.
    """
    params = jax.eval_shape(task.init, 0)[0]
    for name in dict.fromkeys(names):
        if not any(part.numbers or part.form == "channels" for part in parse(name)):
            continue
        try:
            pruner = projector(name, filters=task.filters, pruners=AbstractPruners())
            jax.eval_shape(partial(cram_jax.compress, projector=pruner), params)
        except ValueError as error:
            reason = str(error).split(", got shapes")[0]
            raise ConfigError(
                f"target {name!r} does not suit {config.model.title}: {reason}"
            ) from error


def has_statistics(batch_stats: Any) -> bool:
    """Whether there is batch norm to recalibrate."""
    return bool(jax.tree.leaves(batch_stats))


def _calibration_batches(
    config: RunConfig, images: Source, draw: int
) -> Iterator[tuple[jax.Array, Batch]]:
    """Whole batches, because each counts equally, each with a key to augment it."""
    count = min(config.data.calibration, images.size)
    size = min(config.data.evaluation_batch, count)
    keys = jax.random.split(jax.random.key(draw), count // size)
    return zip(keys, images.training_batches(size, draw, 0, count // size), strict=True)
