"""An evaluation that was stopped continues with the targets that are missing."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluation import Accuracy
from experiments.run_directory import reading, write_text


def resumable(
    file: Path,
    depends_on: dict[str, Any],
    names: Sequence[str],
    evaluate: Callable[[str], Accuracy],
) -> Iterator[tuple[Accuracy, float]]:
    """Evaluates the targets in turn and stores each when it is done.

    Args:
      file: JSON; targets that it holds are not evaluated again. Remove it when
        everything is stored elsewhere.
      depends_on: what the results depend on apart from the target, as JSON; if it
        differs from the file's, the file is replaced.
      names: the targets.
      evaluate: evaluates one target.

    Yields:
      For each target its accuracy and how many seconds it took.

    Raises:
      RunError: the file cannot be read or written.
    """
    stored: dict[str, Any] = {"depends_on": depends_on, "targets": {}}
    if file.exists():
        with reading(file, "; remove it to start over"):
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["depends_on"] == depends_on:
                stored = found
                for name in set(names) & set(found["targets"]):
                    _accuracy(found["targets"][name])
    for name in names:
        if name not in stored["targets"]:
            start = time.perf_counter()
            accuracy = evaluate(name)
            seconds = time.perf_counter() - start
            stored["targets"][name] = accuracy._asdict() | {"seconds": seconds}
            write_text(file, json.dumps(stored, indent=2) + "\n")
        yield _accuracy(stored["targets"][name])


def _accuracy(stored: dict[str, Any]) -> tuple[Accuracy, float]:
    fields = dict(stored)
    seconds = float(fields.pop("seconds"))
    return Accuracy(**fields | {"draws": tuple(fields["draws"])}), seconds
