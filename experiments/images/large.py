"""Labelled images that are too large for memory: decoded and cropped by workers."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from experiments.batches import Batch, Source

SIDE = 224
SHORT_SIDE = 256  # of an image for evaluation, before its middle is cut out
THREADS = 8
# Of ImageNet, as torchvision's networks expect them.
MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255
STD = np.array([0.229, 0.224, 0.225], np.float32) * 255

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


class LargeImages(Source):
    """Images on disk, as 224x224: ``image`` and ``label``.

    Training crops a part of random size and place, evaluation the middle. Batches are
    made ahead of time, by threads or by processes; the content does not depend on
    which.

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

    def take(self, chosen: Sequence[int] | np.ndarray) -> Batch:
        """The middles of some images, and their labels."""
        return self.cut(chosen, lambda index, size: middle(*size))

    def take_training(self, chosen: np.ndarray, seed: int, epoch: int) -> Batch:
        """Random parts of some images, a function of seed, epoch and image."""

        def box(index: int, size: tuple[int, int]) -> Box:
            return random_box(np.random.default_rng((seed, epoch, index)), *size)

        return self.cut(chosen, box)

    def cut(
        self,
        chosen: Sequence[int] | np.ndarray,
        box: Callable[[int, tuple[int, int]], Box],
    ) -> Batch:
        """Parts of some images, ``box(index, (width, height))``, as 224x224."""
        images = np.empty((len(chosen), SIDE, SIDE, 3), np.uint8)
        labels = np.empty(len(chosen), np.int32)
        for row, index in enumerate(map(int, chosen)):
            example = self._source[self._indices[index]]
            picture = Image.fromarray(example["image"].squeeze()).convert("RGB")
            part = box(index, picture.size)
            images[row] = np.asarray(
                picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, part)
            )
            labels[row] = example["label"]
        return {"image": images, "label": labels}

    def made(
        self, make: Callable[[int], Batch], start: int, stop: int
    ) -> Iterator[Batch]:
        """See `Source.made`; ahead of time, by threads or processes."""
        import grain  # slow to import, and needed only here

        # An element is a batch, so its content does not depend on the number of
        # workers.
        batches = grain.MapDataset.range(start, stop).map(make)
        if not self._workers:
            options = grain.ReadOptions(THREADS, prefetch_buffer_size=THREADS)
            return iter(batches.to_iter_dataset(options))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # only absl programs parse them
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        processes = grain.multiprocessing.MultiprocessingOptions(
            self._workers, per_worker_buffer_size=2
        )
        return iter(batches.to_iter_dataset(options).mp_prefetch(processes))


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
    # The image is so narrow that nothing fits: as much of its middle as possible.
    wide = min(width, round(height * 4 / 3))
    high = min(height, round(width * 4 / 3))
    x, y = (width - wide) / 2, (height - high) / 2
    return x, y, x + wide, y + high


def middle(width: int, height: int) -> Box:
    """The part that is 224x224 once the short side is 256."""
    side = min(width, height) * SIDE / SHORT_SIDE
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
