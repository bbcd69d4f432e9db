"""What is particular to runs on text, see `experiments.kinds.Kind`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from cram_jax.structure import Structure
from experiments.batches import Arrays
from experiments.compression.channels import parameter_shapes
from experiments.datasets import default_data_dir
from experiments.errors import ConfigError, DataError, VocabularyError, cannot_write
from experiments.task import Model, Task
from experiments.text import classification, question_answering
from experiments.text.config import BertModelConfig, TextConfig
from experiments.text.data import (
    QuestionSet,
    TextDataset,
    labelled_files,
    read_glue_task,
    read_questions,
    vocabulary_of,
)
from experiments.text.deployment import deploy, samples
from experiments.text.files import read_labelled
from experiments.text.huggingface import save_bert
from experiments.text.network import Network, check_weights
from experiments.text.tokenization import (
    WordPiece,
    copy_vocabulary,
    load_wordpiece,
    vocabulary_files,
)

__all__ = ["check_weights", "deploy", "samples"]

SOURCES = "a run's directory"
WEIGHT_FILES: tuple[str, ...] = ()
LIBRARY = "huggingface"
VOCABULARY = "vocabulary"


class _Family(NamedTuple):
    """Tasks that read and evaluate text in one way.

    Attributes:
      read: the data, as rows of tokens.
      network: the BERT and its head.
      task: what it learns.
    """

    read: Callable[[TextConfig, WordPiece, Path], TextDataset]
    network: Callable[[TextConfig], Network]
    task: Callable[[TextConfig], Task]


def _family(config: TextConfig) -> _Family:
    """How the text of a configuration is read and evaluated."""
    if config.data.asks_questions:
        return _Family(
            read_questions,
            question_answering.make_network,
            question_answering.question_answering,
        )
    read = labelled_files if config.data.name == "file" else read_glue_task
    return _Family(
        read, classification.make_network, classification.text_classification
    )


def prepare(
    config: TextConfig, data_dir: Path | None = None, *, workers: int = 0
) -> tuple[TextDataset, Task]:
    """See `Kind`."""
    del workers
    return load_text(config, data_dir), text_task(config)


def network(
    config: TextConfig, data: TextDataset, params: Any, batch_stats: Any
) -> nnx.Module:
    """See `Kind`."""
    del data, batch_stats
    return _family(config).network(config).module(params)


def make_task(config: TextConfig, data: TextDataset) -> Task:
    """See `Kind`."""
    del data
    return text_task(config)


def smaller_model(
    config: TextConfig, data: TextDataset, structure: Structure, kept: Any
) -> BertModelConfig:
    """See `Kind`."""
    del data
    model, shapes = config.model, parameter_shapes(structure, kept)
    layers = [f"bert/layer{i}" for i in range(model.num_hidden_layers)]
    features = [shapes[f"{layer}/attention/query/kernel"][1] for layer in layers]
    return dataclasses.replace(
        model,
        layer_heads=tuple(width // model.head_size for width in features),
        layer_units=tuple(
            shapes[f"{layer}/intermediate/kernel"][1] for layer in layers
        ),
    )


def load_text(config: TextConfig, data_dir: Path | None = None) -> TextDataset:
    """Reads the text of a run, and tokenizes it.

    Args:
      config: which text, and how rows are made.
      data_dir: where tensorflow-datasets keeps it; by default the user's cache.

    Returns:
      Rows of tokens.

    Raises:
      ConfigError: there is no vocabulary, or rows have no room.
      VocabularyError: the vocabulary is missing, or not that of the network.
      DatasetMissing: the data set is not in ``data_dir``.
      DataError: a file is missing, or does not hold what it should.
    """
    wordpiece = load_wordpiece(vocabulary_of(config), config.model.vocab_size)
    data = _family(config).read(config, wordpiece, data_dir or default_data_dir())
    judged = data.evaluation
    _check_ids(config, data.train.arrays)
    if isinstance(judged, QuestionSet):
        _check_ids(config, judged.windows.features)
    else:
        _check_ids(config, judged.arrays)
    return data


def _check_ids(config: TextConfig, arrays: Arrays) -> None:
    """Raises if a lookup would reach beyond its table, where jax fills in NaN."""
    for array, field in (
        ("input_ids", "vocab_size"),
        ("token_type_ids", "type_vocab_size"),
    ):
        largest, size = int(arrays[array].max()), getattr(config.model, field)
        if largest >= size:
            reason = "two texts in a row need two" if array == "token_type_ids" else ""
            raise ConfigError(
                f"model.{field}={size} is too small for {config.data.name}, whose "
                f"{array} reach {largest}" + (f": {reason}" if reason else "")
            )


def text_task(config: TextConfig) -> Task:
    """The task of a run on text, which does not depend on its data."""
    return _family(config).task(config)


def resolve(config: TextConfig) -> TextConfig:
    """Adds the labels of the training file to the configuration."""
    if config.data.name != "file" or config.data.labels:
        return config
    config.check_inputs()
    data = config.data
    rows = read_labelled(str(config.train_file), data.text_columns, data.label_column)
    labels = tuple(sorted({row.label for row in rows}))
    if len(labels) < 2:
        raise DataError(f"{config.train_file} must hold at least two labels")
    return dataclasses.replace(config, data=dataclasses.replace(data, labels=labels))


def check_teacher(config: TextConfig, theirs: TextConfig, run: Path) -> None:
    """See `Kind`; both read the same tokens."""
    ours, others = (
        load_wordpiece(vocabulary_of(c), c.model.vocab_size).tokenizer.get_vocab()
        for c in (config, kept_sources(theirs, run))
    )
    if ours != others:
        raise ConfigError(
            f"teacher must have the same vocabulary, got another in {run}"
        )
    tasks = [(c.data.name, c.data.labels) for c in (config, theirs)]
    if tasks[0] != tasks[1]:
        raise ConfigError(f"teacher must be for {tasks[0]}, {run} is for {tasks[1]}")


def load_weights(config: TextConfig, file: Path, classes: int | None) -> Model:
    """Published weights are named by ``weights``, not by ``init_from``."""
    del config, classes
    raise ConfigError(f"init_from must be {SOURCES}, got {file}")


def keep_sources(config: TextConfig, run: Path) -> None:
    """Copies the vocabulary into the run, so that it is self-contained."""
    folder = run / VOCABULARY
    try:
        copy_vocabulary(vocabulary_of(config), folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def kept_sources(config: TextConfig, run: Path) -> TextConfig:
    """Names the vocabulary of the run."""
    folder = run / VOCABULARY
    if not folder.is_dir():
        raise VocabularyError(
            f"{run} lacks its {VOCABULARY}, a folder with vocab.txt or tokenizer.json; "
            f"copy the vocabulary of its weights there"
        )
    return dataclasses.replace(config, vocabulary=str(folder))


def export(
    config: TextConfig, model: Model, run: Path, out: Path, vocabulary: Path | None
) -> None:
    """Writes a Hugging Face directory, with the vocabulary stored in the run."""
    if config.model.is_shrunken:
        raise ConfigError(
            f"transformers has BERTs with all their heads and units, not {run}, which "
            f"has heads {config.model.heads_of_layers} and units "
            f"{config.model.units_of_layers}; the formats of engines hold it"
        )
    source = vocabulary or run / VOCABULARY
    vocabulary_files(source)  # says what is missing before anything is written
    if config.weights and out.resolve() == Path(config.weights).resolve():
        raise ConfigError(f"out must not be the weights of the run, got {out}")
    try:
        network = _family(config).network(config)
        save_bert(out, network.module(model[0]), config.data.labels)
        copy_vocabulary(source, out)
    except OSError as error:
        raise cannot_write(out, error) from error
