"""The tasks of GLUE: one or two sentences, and a label.

Reference: Wang et al., GLUE, ICLR 2019, arXiv 1804.07461. WNLI's development set is
adversarial with respect to its training set.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.datasets import examples, not_prepared, open_dataset
from experiments.errors import ConfigError, DataError, DatasetMissing
from experiments.text.tokenization import WordPiece


class GlueTask(NamedTuple):
    """The inputs, outputs and metrics of a task.

    Attributes:
      columns: the one or two texts, in tensorflow-datasets' ``glue``.
      outputs: of the network: classes, or 1 for a regression.
      metrics: see `scores.label_scores`; the first one selects models.
      evaluation: the splits with public labels that are not trained on.
    """

    columns: tuple[str, ...]
    outputs: int
    metrics: tuple[str, ...]
    evaluation: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        return self.outputs == 1


_TWO = ("sentence1", "sentence2")

TASKS = {
    "cola": GlueTask(("sentence",), 2, ("matthews",)),
    "sst2": GlueTask(("sentence",), 2, ("accuracy",)),
    "mrpc": GlueTask(_TWO, 2, ("f1", "accuracy")),
    "qqp": GlueTask(("question1", "question2"), 2, ("f1", "accuracy")),
    "stsb": GlueTask(_TWO, 1, ("pearson", "spearman")),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        3,
        ("accuracy",),
        ("validation_matched", "validation_mismatched"),
    ),
    "qnli": GlueTask(("question", "sentence"), 2, ("accuracy",)),
    "rte": GlueTask(_TWO, 2, ("accuracy",)),
    "wnli": GlueTask(_TWO, 2, ("accuracy",)),
}


def glue_task(name: str) -> GlueTask:
    """Finds a task.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


class Texts(NamedTuple):
    """Labelled texts.

    Attributes:
      rows: of each example, its one or two texts.
      labels: (count,), int32 for classes and float32 for a regression.
    """

    rows: Sequence[tuple[str, ...]]
    labels: np.ndarray


def read_glue(name: str, split: str, data_dir: Path) -> Texts:
    """Reads a split of a task.

    Args:
      name: of the task.
      split: "train", one of the task's evaluation splits, or a part of one such as
        ``train[:1000]``.
      data_dir: where tensorflow-datasets keeps ``glue``.

    Raises:
      ConfigError: there is no such task or split.
      DatasetMissing: the task is not in ``data_dir``.
      DataError: the labels of the split are hidden.
    """
    task = glue_task(name)
    try:
        builder = open_dataset(f"glue/{name}", data_dir)
    except DatasetMissing as error:
        # Without TensorFlow, tensorflow-datasets does not even know its name.
        raise not_prepared(f"glue/{name}", data_dir) from error
    rows = examples(builder, split)
    kind = np.float32 if task.is_regression else np.int32
    labels = np.array([row["label"] for row in rows], kind)
    if (labels < 0).any():
        raise DataError(
            f"glue/{name} in {data_dir}: the labels of {split} are hidden; splits with "
            f"labels are train, {', '.join(task.evaluation)}"
        )
    texts = [tuple(row[column].decode() for column in task.columns) for row in rows]
    return Texts(texts, labels)


def check_room(texts: int, max_length: int) -> int:
    """How many tokens of one or two texts a row holds.

    Raises:
      ConfigError: there is not one for each.
    """
    room = max_length - 1 - texts
    if room < texts:
        raise ConfigError(
            f"max_length must be at least {1 + 2 * texts}, got {max_length}"
        )
    return room


def encode(
    texts: Texts, wordpiece: WordPiece, max_length: int
) -> dict[str, np.ndarray]:
    """Rows of tokens, and their labels.

    Args:
      texts: at least one.
      wordpiece: the vocabulary.
      max_length: tokens in a row; longer texts lose their last tokens, of two texts
        the longer one first.

    Returns:
      ``input_ids``, ``attention_mask``, ``token_type_ids``, int32, (count, max_length),
      and ``label``.

    Raises:
      ConfigError: max_length leaves no room.
    """
    room = check_room(len(texts.rows[0]), max_length)
    columns = zip(*texts.rows, strict=True)
    ids = [[tokens.ids for tokens in wordpiece(column)] for column in columns]
    sequences = [truncate(row, room) for row in zip(*ids, strict=True)]
    return wordpiece.pack(sequences, max_length) | {"label": texts.labels}


def truncate(texts: tuple[np.ndarray, ...], room: int) -> tuple[np.ndarray, ...]:
    """Cuts one or two texts to ``room`` tokens, the longer one down to the other first.

    If both are cut and room is odd, the longer one keeps one more, or the second if
    equal.
    """
    if len(texts) == 1:
        return (texts[0][:room],)
    first, second = texts
    shorter = min(len(first), len(second), room // 2)
    if len(first) > len(second):
        return first[: room - shorter], second[:shorter]
    return first[:shorter], second[: room - shorter]
