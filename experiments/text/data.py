"""The text of a run: questions about contexts, or sentences with a label."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.batches import Examples
from experiments.errors import ConfigError, DataError
from experiments.text.config import TextConfig
from experiments.text.files import read_labelled
from experiments.text.glue import Texts, encode, glue_task, read_glue
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

    @property
    def content(self) -> Any:
        """As that of a `Source`."""
        asked = json.dumps(self.questions).encode()
        return np.frombuffer(asked, np.uint8), self.windows.features


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


def held_out(texts: Sequence[tuple[str, ...]], count: int) -> np.ndarray:
    """Which examples to hold out of training.

    They are the first in the order of a hash of their texts, with all that have the
    same texts as one of them. So none of them is also trained on, and examples that are
    added later never turn trained ones into held-out ones.

    Args:
      texts: of each example.
      count: how many to hold out, at least.

    Returns:
      bool, (examples,).

    Raises:
      ConfigError: none would be left.
    """
    if not count:
        return np.zeros(len(texts), np.bool_)
    hashes = np.array([_hash(row) for row in texts])
    chosen = hashes <= np.sort(hashes)[min(count, len(hashes)) - 1]
    if chosen.all():
        raise ConfigError(
            f"validation={count} leaves none of the {len(texts)} training examples"
        )
    return chosen


def _hash(texts: tuple[str, ...]) -> int:
    digest = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big")


def read_questions(
    config: TextConfig, wordpiece: WordPiece, data_dir: Path
) -> TextDataset:
    """Reads SQuAD: the files of the configuration, or tensorflow-datasets' data.

    Questions are held out with all others about the same context.
    """
    data = config.data

    def read(file: str | None, split: str) -> list[Question]:
        return read_json(file) if file else read_tfds(data_dir, split)

    def encoded(questions: Sequence[Question], limit: int) -> QuestionSet:
        questions = [questions[i] for i in subset_indices(len(questions), limit)]
        windows = make_windows(
            questions,
            wordpiece,
            max_length=data.max_length,
            stride=data.stride,
            question_limit=data.question_limit,
        )
        return QuestionSet(questions, windows)

    questions = read(config.train_file, "train")
    held = held_out([(q.context,) for q in questions], data.validation)
    train = [q for q, out in zip(questions, held, strict=True) if not out]
    if data.validation:
        judged = [q for q, out in zip(questions, held, strict=True) if out]
    else:
        judged = read(config.eval_file, "validation")
    return TextDataset(
        Examples(encoded(train, data.examples).windows.features),
        encoded(judged, data.evaluation_examples),
    )


def read_glue_task(
    config: TextConfig, wordpiece: WordPiece, data_dir: Path
) -> TextDataset:
    """Reads a task of GLUE."""
    name = config.data.name
    # MNLI has two; the first is "matched".
    split = glue_task(name).evaluation[0]
    return _labelled(
        config,
        wordpiece,
        read_glue(name, "train", data_dir),
        lambda: read_glue(name, split, data_dir),
    )


def labelled_files(
    config: TextConfig, wordpiece: WordPiece, data_dir: Path
) -> TextDataset:
    """Reads texts with labels from the files of the configuration."""
    del data_dir
    data = config.data
    codes = {label: index for index, label in enumerate(data.labels)}

    def read(file: str | None) -> Texts:
        rows = read_labelled(str(file), data.text_columns, data.label_column)
        for row in rows:
            if row.label not in codes:
                raise DataError(
                    f"{file}: line {row.line} has the label {row.label!r}, expected "
                    f"one of {', '.join(data.labels)}"
                )
        labels = np.array([codes[row.label] for row in rows], np.int32)
        return Texts([row.texts for row in rows], labels)

    train = read(config.train_file)
    return _labelled(config, wordpiece, train, lambda: read(config.eval_file))


def _labelled(
    config: TextConfig,
    wordpiece: WordPiece,
    train: Texts,
    read_evaluation: Callable[[], Texts],
) -> TextDataset:
    data = config.data
    held = held_out(train.rows, data.validation)

    def encoded(texts: Texts, places: np.ndarray, limit: int) -> Examples:
        chosen = places[subset_indices(len(places), limit)]
        part = Texts([texts.rows[i] for i in chosen], texts.labels[chosen])
        return Examples(encode(part, wordpiece, data.max_length))

    if data.validation:
        judged, places = train, np.flatnonzero(held)
    else:
        judged = read_evaluation()
        places = np.arange(len(judged.rows))
    return TextDataset(
        encoded(train, np.flatnonzero(~held), data.examples),
        encoded(judged, places, data.evaluation_examples),
    )
