"""What a run reports: JSON lines, TensorBoard and a progress bar."""

import json
import sys
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


class Metrics:
    """Writes ``metrics.jsonl`` and TensorBoard events into a run directory.

    Args:
      run: the directory.
      step: the step that the run goes on from; later lines are dropped.
    """

    def __init__(self, run: Path, step: int = 0):
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(run), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records values under the number of steps taken so far."""
        print(json.dumps({"step": step} | values), file=self._file, flush=True)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
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


def make_console() -> Console:
    """A console that is wide enough for our tables where there is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=100)
