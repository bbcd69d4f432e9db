"""From a configuration to its data and its task."""

from pathlib import Path
from typing import Any

from experiments.config import RunConfig
from experiments.images.data import load
from experiments.images.task import classification
from experiments.task import Task
from experiments.text.classification import text_classification
from experiments.text.config import TextConfig
from experiments.text.data import load_text
from experiments.text.question_answering import question_answering


def prepare(
    config: RunConfig, data_dir: Path | None = None, *, workers: int = 0
) -> tuple[Any, Task]:
    """Reads the data of a run and makes its task.

    Args:
      config: the run.
      data_dir: where tensorflow-datasets keeps its data; by default the user's cache.
      workers: processes that decode large images; 0: threads.

    Returns:
      The data, whose ``train`` and ``evaluation`` the task understands, and the task.
    """
    if isinstance(config, TextConfig):
        return load_text(config, data_dir), text_task(config)
    data = load(config.data, data_dir, workers=workers)
    return data, classification(config, data)


def text_task(config: TextConfig) -> Task:
    """The task of a run on text, which needs none of its data."""
    if config.data.name == "squad":
        return question_answering(config)
    return text_classification(config)
