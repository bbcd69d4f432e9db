"""One model, many targets: accuracy as pruned and after recalibration."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import cram_jax
from experiments.config import Config
from experiments.data.images import Batch, Dataset, Images
from experiments.data.large import LargeImages
from experiments.targets import projector, sparsity
from experiments.tasks.classification import Task


class Accuracy(NamedTuple):
    """Accuracy of one model on one target, in per cent.

    Attributes:
      target: its name, such as ``k90``.
      pruned: with the statistics of the dense model.
      recalibrated: with batch-norm statistics of the compressed one; the mean, where
        there are several draws of calibration images.
      draws: recalibrated, for every draw.
    """

    target: str
    pruned: float
    recalibrated: float
    draws: tuple[float, ...] = ()


class Evaluation(NamedTuple):
    """Compiled functions, shared by all the models of one shape.

    Attributes:
      compress: ``(params, target) -> Projection``, in one shot.
      recalibrate: ``(params, batch_stats, draw=None) -> batch_stats``, on the first
        training images, or on those of a random draw by its number.
      accuracy: ``(params, batch_stats) -> float``, in per cent.
    """

    compress: Callable[[Any, str], cram_jax.Projection]
    recalibrate: Callable[..., Any]
    accuracy: Callable[[Any, Any], float]


def make_evaluation(config: Config, data: Dataset, task: Task) -> Evaluation:
    """Prepares an evaluation.

    Args:
      config: sizes of the batches, number of calibration images.
      data: calibration images are of ``train``; ``evaluation`` is judged.
      task: the model.

    Returns:
      The functions; each compiles at first use.
    """
    compressors: dict[str, Callable[[Any], cram_jax.Projection]] = {}

    @jax.jit
    def prune(params: Any, share: float) -> cram_jax.Projection:
        """One compilation for every sparsity."""
        return cram_jax.compress(params, cram_jax.top_k(share))

    def compress(params: Any, target: str) -> cram_jax.Projection:
        share = sparsity(target)
        if share is not None:
            return prune(params, share)
        if target not in compressors:
            chosen = partial(cram_jax.compress, projector=projector(target))
            compressors[target] = jax.jit(chosen)
        return compressors[target](params)

    @jax.jit
    def training_pass(params: Any, batch_stats: Any, batch: Batch) -> Any:
        return task.loss_fn(params, batch_stats, batch)[1]

    def recalibrate(params: Any, batch_stats: Any, draw: int | None = None) -> Any:
        return cram_jax.recalibrate(
            partial(training_pass, params),
            batch_stats,
            _calibration_batches(config, data.train, draw),
        )

    def accuracy(params: Any, batch_stats: Any) -> float:
        return task.evaluate(params, batch_stats, data.evaluation)["accuracy"]

    return Evaluation(compress, recalibrate, accuracy)


def evaluate_targets(
    evaluation: Evaluation,
    params: Any,
    batch_stats: Any,
    targets: Sequence[str],
    calibrations: int = 0,
) -> Iterator[Accuracy]:
    """Compresses one model to every target and judges it, before and after.

    Args:
      evaluation: from `make_evaluation`.
      params: of the dense model.
      batch_stats: of the dense model.
      targets: their names.
      calibrations: random draws of calibration images, the same for every model; 0:
        the first training images, once.

    Yields:
      One entry a target, in order.
    """
    for target in targets:
        compressed = evaluation.compress(params, target).params
        draws = [
            evaluation.accuracy(
                compressed, evaluation.recalibrate(compressed, batch_stats, draw)
            )
            for draw in (range(calibrations) if calibrations else [None])
        ]
        yield Accuracy(
            target,
            evaluation.accuracy(compressed, batch_stats),
            float(np.mean(draws)),
            tuple(draws) if calibrations else (),
        )


def _calibration_batches(
    config: Config, images: Images | LargeImages, draw: int | None
) -> Iterator[Batch]:
    """Whole batches, as every one counts alike."""
    available = images.size
    count = min(config.data.calibration, available)
    size = min(config.data.evaluation_batch, count)
    order = np.arange(available)
    if draw is not None:
        order = np.random.default_rng(draw).permutation(available)
    for begin in range(0, count - size + 1, size):
        yield images.take(np.sort(order[begin : begin + size]))
