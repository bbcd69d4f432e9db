"""Scikit-learn's handwritten digits as a tensorflow-datasets builder."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_IMAGES = 500


class Digits(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """1,797 grey images of 8x8 pixels in 17 levels: 1,297 to train, 500 to test.

    The images come with scikit-learn, so nothing is downloaded. The split is random
    and stratified, the same on every machine.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        # Slow to import, and needed only here.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)),
            test_size=TEST_IMAGES,
            random_state=0,
            stratify=digits.target,
        )
        return {
            "train": self._generate_examples(digits, train),
            "test": self._generate_examples(digits, test),
        }

    def _generate_examples(
        self, digits: Any, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices.tolist():
            image = digits.images[index].astype(np.uint8)[..., None]
            yield index, {"image": image, "label": int(digits.target[index])}
