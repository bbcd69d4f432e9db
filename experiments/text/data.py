"""The text of a run: questions about contexts, or sentences with a label."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.batches import Examples
from experiments.errors import ConfigError, DataError
from experiments.text.config import TextConfig
from experiments.text.files import read_labelled
from experiments.text.glue import encode, glue_task, read_glue
from experiments.text.squad import Question, Windows, make_windows, read_json, read_tfds
from experiments.text.tokenization import WordPiece


class QuestionSet(NamedTuple):
    """Questions to evaluate a network on.

    Attributes:
      questions: with their gold answers.
      windows: their parts that the network reads.
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
      evaluation: what to evaluate on.
    """

    train: Examples
    evaluation: Examples | QuestionSet


def vocabulary_of(config: TextConfig) -> Path:
    """Where the vocabulary of a run is.

    Raises:
      ConfigError: neither it nor the weights are named.
    """
    place = config.vocabulary or config.weights
    if not place and config.init_from:
        beside = Path(config.init_from) / "vocabulary"  # of the run it starts from
        place = str(beside) if beside.is_dir() else None
    if not place:
        raise ConfigError(
            f"{config.name} reads text with the vocabulary of its weights: name their "
            f"directory with --weights, or the vocabulary with --vocabulary"
        )
    return Path(place)


def subset_indices(count: int, limit: int) -> np.ndarray:
    """The indices of randomly drawn examples, in order; 0: of all."""
    if not 0 < limit < count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])


def read_questions(
    config: TextConfig, wordpiece: WordPiece, data_dir: Path
) -> TextDataset:
    """Reads SQuAD: the files of the configuration, or tensorflow-datasets' data."""
    data = config.data

    def read(file: str | None, split: str, limit: int) -> QuestionSet:
        questions = read_json(file) if file else read_tfds(data_dir, split)
        questions = [questions[i] for i in subset_indices(len(questions), limit)]
        windows = make_windows(
            questions,
            wordpiece,
            max_length=data.max_length,
            stride=data.stride,
            question_limit=data.question_limit,
        )
        return QuestionSet(questions, windows)

    train = read(config.train_file, "train", data.examples)
    evaluation = read(config.eval_file, "validation", data.evaluation_examples)
    return TextDataset(Examples(train.windows.features), evaluation)


def read_glue_task(
    config: TextConfig, wordpiece: WordPiece, data_dir: Path
) -> TextDataset:
    """Reads a task of GLUE."""
    data = config.data

    def read(split: str, limit: int) -> Examples:
        arrays = read_glue(data.name, split, wordpiece, data_dir, data.max_length)
        rows = Examples(arrays)
        return Examples(rows.take(subset_indices(rows.size, limit)))

    # MNLI has two; the first is "matched".
    split = glue_task(data.name).evaluation[0]
    return TextDataset(
        read("train", data.examples), read(split, data.evaluation_examples)
    )


def labelled_files(
    config: TextConfig, wordpiece: WordPiece, data_dir: Path
) -> TextDataset:
    """Reads texts with labels from the two files of the configuration."""
    del data_dir
    data = config.data
    codes = {label: index for index, label in enumerate(data.labels)}

    def read(file: str | None, limit: int) -> Examples:
        rows = read_labelled(str(file), data.text_columns, data.label_column)
        for row in rows:
            if row.label not in codes:
                raise DataError(
                    f"{file}: row {row.number} has the label {row.label!r}, expected "
                    f"one of {', '.join(data.labels)}"
                )
        rows = [rows[i] for i in subset_indices(len(rows), limit)]
        columns = [list(texts) for texts in zip(*(r.texts for r in rows), strict=True)]
        labels = np.array([codes[row.label] for row in rows], np.int32)
        arrays = encode(columns, wordpiece, data.max_length)
        return Examples(arrays | {"label": labels})

    return TextDataset(
        read(config.train_file, data.examples),
        read(config.eval_file, data.evaluation_examples),
    )
