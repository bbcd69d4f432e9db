"""Silence for what a restore that failed leaves behind."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def late_reads_ignored() -> Iterator[None]:
    """Drops the errors of reads that outlive a failed restore.

    Orbax starts one read for each array. The first that fails ends the restore, and
    its error is reported. The others then find their event loop closed, and Python
    would print a traceback for each of them, next to our message.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs", /) -> None:
        if not _is_late_read(unraisable):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _is_late_read(unraisable: "sys.UnraisableHookArgs") -> bool:
    error = unraisable.exc_value
    closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    return closed or "orbax" in getattr(code, "co_filename", "")
