"""The text of a run: questions about contexts, or sentences with a label."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.batches import Examples
from experiments.datasets import default_data_dir
from experiments.errors import ConfigError
from experiments.text.config import TextConfig
from experiments.text.glue import glue_task, read_glue
from experiments.text.squad import Question, Windows, make_windows, read_json, read_tfds
from experiments.text.tokenization import WordPiece, load_wordpiece


class Asked(NamedTuple):
    """Questions to judge a network by.

    Attributes:
      questions: with their gold answers.
      windows: what the network reads of them.
    """

    questions: Sequence[Question]
    windows: Windows

    @property
    def size(self) -> int:
        """How many questions they are."""
        return len(self.questions)


class TextDataset(NamedTuple):
    """A data set in memory, as numbers.

    Attributes:
      train: rows to train on.
      evaluation: what to judge on.
    """

    train: Examples
    evaluation: Examples | Asked


def load_text(config: TextConfig, data_dir: Path | None = None) -> TextDataset:
    """Reads the text of a run, and divides it into tokens.

    Args:
      config: which, and what makes its rows.
      data_dir: where tensorflow-datasets keeps it; by default the user's cache.

    Returns:
      Rows of tokens.

    Raises:
      ConfigError: there is no vocabulary, or rows have no room.
      VocabularyError: the vocabulary is missing, or not that of the network.
      DatasetMissing: the data set is not in ``data_dir``.
      DataError: a file is missing, or does not hold what it should.
    """
    wordpiece = load_wordpiece(vocabulary(config), config.model.vocab_size)
    data_dir = data_dir or default_data_dir()
    if config.data.name == "squad":
        return _squad(config, wordpiece, data_dir)
    return _glue(config, wordpiece, data_dir)


def vocabulary(config: TextConfig) -> Path:
    """Where the vocabulary of a run lies.

    Raises:
      ConfigError: neither it nor the weights are named.
    """
    place = config.vocabulary or config.weights
    if not place:
        raise ConfigError(
            f"{config.name} reads text with the vocabulary of its weights: name their "
            f"directory with --weights, or the vocabulary with --vocabulary"
        )
    return Path(place)


def some(count: int, limit: int) -> np.ndarray:
    """The places of so many examples, drawn at random, in order; 0: of all."""
    if not 0 < limit < count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])


def _squad(config: TextConfig, wordpiece: WordPiece, data_dir: Path) -> TextDataset:
    data = config.data

    def read(file: str | None, split: str, limit: int) -> Asked:
        questions = read_json(file) if file else read_tfds(data_dir, split)
        questions = [questions[i] for i in some(len(questions), limit)]
        windows = make_windows(
            questions,
            wordpiece,
            max_length=data.max_length,
            stride=data.stride,
            question_limit=data.question_limit,
        )
        return Asked(questions, windows)

    train = read(config.train_file, "train", data.examples)
    evaluation = read(config.eval_file, "validation", data.evaluation_examples)
    return TextDataset(Examples(train.windows.features), evaluation)


def _glue(config: TextConfig, wordpiece: WordPiece, data_dir: Path) -> TextDataset:
    data = config.data

    def read(split: str, limit: int) -> Examples:
        arrays = read_glue(data.name, split, wordpiece, data_dir, data.max_length)
        rows = Examples(arrays)
        return Examples(rows.take(some(rows.size, limit)))

    # Of the two of MNLI the first, "matched".
    split = glue_task(data.name).evaluation[0]
    return TextDataset(
        read("train", data.examples), read(split, data.evaluation_examples)
    )
