"""Keeps the best model; stops early if ``patience`` is set."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import RunConfig
from experiments.kinds import kind_of
from experiments.runs import checkpoints
from experiments.runs.directory import read_status, write_status
from experiments.runs.metrics import read_lines
from experiments.sharding import on_first_process


class Stopping:
    """Stores the best model so far, and says when a run has stopped improving.

    What it knows follows from ``metrics.jsonl``, so a resumed run stops where one that
    was never interrupted does. With patience, the best model is that of the run;
    otherwise it is stored in ``best``, a run directory of its own, and a run that is
    evaluated only at its end has none.

    Args:
      config: ``patience`` says how many evaluations in a row may be no better than the
        best; 0: all of them.
      run: the directory.
      metric: the metric of the task; more is better.
      start: the step that the run resumes from.
      patience_from: evaluations up to this step do not count against the patience.

    Attributes:
      evaluation_is_missing: whether the run ended between the checkpoint that it
        resumes from and an evaluation at the same step.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        metric: str,
        start: int,
        patience_from: int = 0,
    ):
        self._config, self._run, self._metric = config, run, metric
        self._patience_from = patience_from
        stored = [*map(json.loads, read_lines(run / "metrics.jsonl", start))]
        name = f"eval_{metric}"
        judged = [line for line in stored if name in line]
        self._steps = [line["step"] for line in judged]
        self._values = [line[name] for line in judged]
        # There are no lines of a state that another run left.
        last = stored[-1] if stored else {"step": -1}
        self.evaluation_is_missing = last["step"] == start and name not in last

    @property
    def is_due(self) -> bool:
        """Whether the run is to stop."""
        patience = self._config.patience
        counted = sum(step > self._patience_from for step in self._steps)
        return 0 < patience <= min(counted, self._since_best())

    def judge(
        self, step: int, result: dict[str, float], params: Any, batch_stats: Any
    ) -> None:
        """Records an evaluation, and stores the model if it is the best."""
        if not self._config.evaluate_every:
            return
        self._steps.append(step)
        self._values.append(result[self._metric])
        if self._since_best() == 0:
            directory = self._run if self._config.patience else self._run / "best"
            checkpoints.save_model(directory, self._config, params, batch_stats)
            if directory != self._run:
                on_first_process(lambda: self._describe(directory, step))

    def _describe(self, directory: Path, step: int) -> None:
        kind = kind_of(self._config)
        kind.keep_sources(kind.kept_sources(self._config, self._run), directory)
        where = read_status(self._run).get("data_dir")
        # By the step a report sees that an evaluation was of an earlier model.
        write_status(directory, step=step, **({"data_dir": where} if where else {}))

    def _since_best(self) -> int:
        """Evaluations since the best one, or since the first of equal ones."""
        if not self._values:
            return 0
        return len(self._values) - 1 - int(np.argmax(self._values))
