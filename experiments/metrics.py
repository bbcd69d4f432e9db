"""What a run reports: JSON lines, TensorBoard and a progress bar."""

import contextlib
import json
import sys
from collections.abc import Iterator
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
from tensorboardX import SummaryWriter

from experiments.run_directory import cannot_write, write_text


class Metrics:
    """Writes ``metrics.jsonl`` and TensorBoard events into a run directory.

    Args:
      run: the directory.
      step: the step that the run goes on from; later lines are dropped.
      enabled: whether to write at all; of several processes one does.

    Raises:
      RunError: the directory cannot be written.
    """

    def __init__(self, run: Path, step: int = 0, *, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        self._path = run / "metrics.jsonl"
        write_text(self._path, "".join(lines(self._path, step)))
        try:
            self._file = self._path.open("a")
            self._events = SummaryWriter(
                str(run), purge_step=step + 1 if step else None
            )
        except OSError as error:
            raise cannot_write(run, error) from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records values under the number of steps taken so far.

        Raises:
          RunError: they cannot be written.
        """
        if not self._enabled:
            return
        try:
            print(json.dumps({"step": step} | values), file=self._file, flush=True)
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            # TensorBoard's own thread would keep an error to itself.
            self._events.flush()
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
        # What cannot be written has been said by write().
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._events.close()


def progress_bar(console: Console) -> Progress:
    """A bar with counts and times; silent where the output is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def make_console(*, quiet: bool = False) -> Console:
    """A console that is wide enough for our tables where there is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 100, quiet=quiet)


def lines(path: Path, last: int) -> Iterator[str]:
    """The lines up to a step; one that was cut off when the disk was full is not."""
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= last:
                yield line
