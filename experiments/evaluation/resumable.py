"""An evaluation that was stopped continues with the targets that are missing."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluation.evaluation import Accuracy
from experiments.runs.directory import reading, write_text

ADVICE = "; remove it to start over"


def resumable(
    file: Path,
    depends_on: dict[str, Any],
    names: Sequence[str],
    evaluate: Callable[[str], Accuracy],
) -> Iterator[tuple[Accuracy, float]]:
    """Evaluates the targets in turn and stores each when it is done.

    Args:
      file: JSON; targets that it holds are not evaluated again. Call `forget` when
        everything is stored elsewhere.
      depends_on: what the results depend on apart from the target, as JSON.
      names: the targets.
      evaluate: evaluates one target.

    Yields:
      For each target its accuracy and how many seconds it took.

    Raises:
      RunError: the file cannot be read or written.
    """
    entries = _read(file)
    stored = _of(entries, depends_on)
    for name in set(names) & set(stored):
        with reading(file, ADVICE):
            _accuracy(stored[name])
    for name in names:
        if name not in stored:
            start = time.perf_counter()
            accuracy = evaluate(name)
            seconds = time.perf_counter() - start
            stored[name] = accuracy._asdict() | {"seconds": seconds}
            _write(file, entries)
        yield _accuracy(stored[name])


def forget(file: Path, depends_on: dict[str, Any], names: Sequence[str]) -> None:
    """Removes targets from a file, and the file if nothing is left in it."""
    entries = _read(file)
    stored = _of(entries, depends_on)
    for name in names:
        stored.pop(name, None)
    _write(file, entries)


def _read(file: Path) -> list[dict[str, Any]]:
    """For each of the things that results depend on, the targets so far."""
    if not file.exists():
        return []
    with reading(file, ADVICE):
        entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
        return [
            {n: dict(entry[n]) for n in ("depends_on", "targets")} for entry in entries
        ]


def _of(entries: list[dict[str, Any]], depends_on: dict[str, Any]) -> dict[str, Any]:
    for entry in entries:
        if entry["depends_on"] == depends_on:
            return entry["targets"]
    entries.append({"depends_on": depends_on, "targets": {}})
    return entries[-1]["targets"]


def _write(file: Path, entries: list[dict[str, Any]]) -> None:
    entries = [entry for entry in entries if entry["targets"]]
    if entries:
        write_text(file, json.dumps({"entries": entries}, indent=2) + "\n")
    else:
        file.unlink(missing_ok=True)


def _accuracy(stored: dict[str, Any]) -> tuple[Accuracy, float]:
    fields = dict(stored)
    seconds = float(fields.pop("seconds"))
    return Accuracy(**fields | {"draws": tuple(fields["draws"])}), seconds
