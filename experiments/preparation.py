"""From a configuration to its data and its task."""

from pathlib import Path
from typing import Any

from experiments.config import RunConfig, TextConfig
from experiments.data.images import load
from experiments.data.text import load_text
from experiments.tasks.base import Task
from experiments.tasks.classification import classification
from experiments.tasks.question_answering import question_answering
from experiments.tasks.text_classification import text_classification


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
