"""What a run reports: JSON lines, loggers, and a bar or lines on the console."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.errors import RunError, cannot_write
from experiments.runs.directory import write_text
from experiments.runs.loggers import Logger


class Metrics:
    """Writes ``metrics.jsonl`` into a run directory, and passes metrics to loggers.

    Args:
      run: the directory.
      step: the step that the run resumes from; later lines are dropped.
      enabled: whether to write at all; if there are several processes, one does.
      loggers: closed at the end.

    Raises:
      RunError: the directory cannot be written.
    """

    def __init__(
        self,
        run: Path,
        step: int = 0,
        *,
        enabled: bool = True,
        loggers: Sequence[Logger] = (),
    ):
        self._enabled, self._loggers = enabled, loggers
        if not enabled:
            return
        self._path = run / "metrics.jsonl"
        write_text(self._path, "".join(read_lines(self._path, step)))
        try:
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records values under the number of steps taken so far.

        Raises:
          RunError: they cannot be written.
        """
        if not self._enabled:
            return
        try:
            print(json.dumps({"step": step} | values), file=self._file, flush=True)
            for logger in self._loggers:
                logger.write(step, values)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._enabled:
            return
        # write() has already reported what cannot be written.
        with contextlib.suppress(OSError):
            self._file.close()
        for logger in self._loggers:
            logger.close()


def progress_bar(console: Console) -> Progress:
    """A bar with counts and times; silent if the output is not a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def make_console(*, quiet: bool = False) -> Console:
    """A console that prints text verbatim, including names with brackets.

    Without a terminal it is wide enough for our tables.
    """
    width = None if sys.stdout.isatty() else 120
    return Console(width=width, quiet=quiet, markup=False, highlight=False)


class Report:
    """Reports the progress of a run on a console: above the bar, or line by line.

    Args:
      progress: the bar; its console is used.
      quiet: whether to show only the bar.
    """

    def __init__(self, progress: Progress, *, quiet: bool = False):
        self._console = progress.console
        self._progress, self._quiet = progress, quiet

    def say(self, message: str) -> None:
        """Prints a line."""
        if not self._quiet:
            self._console.print(message, soft_wrap=True)

    def say_off_terminal(self, message: str) -> None:
        """Prints a line unless a bar shows the same."""
        if not self._console.is_terminal:
            self.say(message)


def read_lines(path: Path, last: int) -> Iterator[str]:
    """The lines of a ``metrics.jsonl`` up to a step.

    A truncated last line, as after a full disk, is dropped.

    Raises:
      RunError: any other line is damaged, or the file cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}") from error
    found = text.splitlines(keepends=True)
    for number, line in enumerate(found, 1):
        try:
            step = json.loads(line)["step"]
            is_due = step <= last
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            if number == len(found):
                return
            raise RunError(
                f"{path}: line {number} is damaged; remove it to continue"
            ) from error
        if is_due:
            yield line if line.endswith("\n") else line + "\n"
