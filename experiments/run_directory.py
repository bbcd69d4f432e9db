"""Small files of a run."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import RunError


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all; what was there before stays until then.

    Raises:
      RunError: it cannot be written; the message says why.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text)
        os.replace(unfinished, path)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def reading(path: Path, advice: str = "") -> Iterator[None]:
    """Whatever fails inside becomes a RunError that names the file and the advice."""
    try:
        yield
    except Exception as error:  # of json, of tensorstore or of orbax
        raise RunError(f"cannot read {path}: {first_line(error)}{advice}") from error


def cannot_write(path: Path, error: Exception) -> RunError:
    """The error that says so, with the system's reason."""
    return RunError(f"cannot write {path}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of an error's message: those of tensorstore and orbax are long."""
    return str(error).strip().split("\n")[0]
