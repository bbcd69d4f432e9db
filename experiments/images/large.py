"""Labelled images that are too large for memory: decoded and cut by workers."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from experiments.batches import Batch, examples_of_step, whole_batches

SIDE = 224
SHORT_SIDE = 256  # of an image for evaluation, before its middle is cut out
THREADS = 8
# Of ImageNet, as torchvision's networks want them.
MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255
STD = np.array([0.229, 0.224, 0.225], np.float32) * 255

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


class LargeImages:
    """Images on disk, as 224x224, a `Source` of ``image`` and ``label``.

    Training cuts out a part of random size and place, evaluation the middle. Batches
    are made ahead, by threads or by processes of their own; what is in them does not
    depend on which.

    Args:
      source: random access to examples with ``image`` (uint8, height, width, channels)
        and ``label``.
      indices: which examples.
      workers: processes; 0: threads.
    """

    def __init__(self, source: Any, indices: range, workers: int = 0):
        self._source = source
        self._indices = indices
        self._workers = workers

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self._indices)

    def training_batches(
        self,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        positions: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """See `Source.training_batches`; a batch is a function of seed and step."""
        whole_batches(self.size, batch_size)
        make = _TrainingBatch(self, batch_size, seed, positions)
        return self._ahead(make, start, stop)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """See `Source.evaluation_batches`."""
        make = _EvaluationBatch(self, batch_size)
        return self._ahead(make, 0, math.ceil(self.size / batch_size))

    def take(self, chosen: Sequence[int] | np.ndarray) -> Batch:
        """The middles of some images, and their labels."""
        return self.cut(chosen, lambda index, size: middle(*size))

    def cut(
        self,
        chosen: Sequence[int] | np.ndarray,
        box: Callable[[int, tuple[int, int]], Box],
    ) -> Batch:
        """Parts of some images, ``box(index, (width, height))``, as 224x224."""
        images = np.empty((len(chosen), SIDE, SIDE, 3), np.uint8)
        labels = np.empty(len(chosen), np.int32)
        for row, index in enumerate(chosen):
            example = self._source[self._indices[index]]
            picture = Image.fromarray(example["image"].squeeze()).convert("RGB")
            part = box(index, picture.size)
            images[row] = np.asarray(
                picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, part)
            )
            labels[row] = example["label"]
        return {"image": images, "label": labels}

    def _ahead(
        self, make: Callable[[int], Batch], start: int, stop: int
    ) -> Iterator[Batch]:
        # Slow to import, and needed here alone.
        import grain

        # An element is a batch, so that its content is the same however many work.
        batches = grain.MapDataset.range(start, stop).map(make)
        if not self._workers:
            options = grain.ReadOptions(THREADS, prefetch_buffer_size=THREADS)
            return iter(batches.to_iter_dataset(options))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks them, and we are no absl program
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        processes = grain.multiprocessing.MultiprocessingOptions(
            self._workers, per_worker_buffer_size=2
        )
        return iter(batches.to_iter_dataset(options).mp_prefetch(processes))


class _TrainingBatch:
    """``step -> batch``, in a form that goes to another process."""

    def __init__(
        self,
        images: LargeImages,
        batch_size: int,
        seed: int,
        positions: np.ndarray | None,
    ):
        self._images = images
        self._batch_size = batch_size
        self._seed = seed
        self._positions = positions

    def __call__(self, step: int) -> Batch:
        epoch, chosen = examples_of_step(
            self._images.size, self._batch_size, self._seed, step
        )
        if self._positions is not None:
            chosen = chosen[self._positions]

        def box(index: int, size: tuple[int, int]) -> Box:
            return random_box(np.random.default_rng((self._seed, epoch, index)), *size)

        return self._images.cut(chosen.tolist(), box)


class _EvaluationBatch:
    """``number -> batch``, in a form that goes to another process."""

    def __init__(self, images: LargeImages, batch_size: int):
        self._images = images
        self._batch_size = batch_size

    def __call__(self, number: int) -> Batch:
        places = np.arange(number * self._batch_size, (number + 1) * self._batch_size)
        last = self._images.size - 1
        batch = self._images.take(np.minimum(places, last).tolist())
        return batch | {"weight": (places <= last).astype(np.float32)}


def random_box(generator: np.random.Generator, width: int, height: int) -> Box:
    """A random part of an image: 8 to 100 % of it, its sides up to 3:4 or 4:3."""
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1.0)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left = int(generator.integers(0, width - wide + 1))
            top = int(generator.integers(0, height - high + 1))
            return left, top, left + wide, top + high
    # An image so narrow that nothing fits: as much of its middle as may be.
    wide = min(width, round(height * 4 / 3))
    high = min(height, round(width * 4 / 3))
    x, y = (width - wide) / 2, (height - high) / 2
    return x, y, x + wide, y + high


def middle(width: int, height: int) -> Box:
    """The part that is 224x224 once the short side is 256."""
    side = min(width, height) * SIDE / SHORT_SIDE
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
