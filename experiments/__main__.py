"""The command line: ``python -m experiments train|compress|evaluate|report|...``.

Nothing here imports jax before it is needed: the first line of help takes a second.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any, Union

import tyro

from experiments.errors import Stopped, UserError
from experiments.runs.late_reads import late_reads_ignored
from experiments.verbs import PARSERS, VERBS, Verb
from experiments.verbs.common import PROGRAM

CONTINUING = ("evaluate", "compare", "lottery", "allocate")
"""Verbs that store each result as they find it."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a full disk, wherever something was written."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with _terminated_by_signal(), late_reads_ignored():
            _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt as interrupt:
        goes_on = arguments[:1] in ([verb] for verb in CONTINUING)
        after = "run the same command to continue" if goes_on else "nothing was saved"
        print(f"stopped; {after}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = f" {error.filename}" if error.filename else ""
        print(f"error: cannot write{place}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:
        import cram_jax  # not above: jax takes a second to load

        print(f"cram-jax {cram_jax.__version__}")
        return
    verb = parse(arguments)
    verb.check()
    verb.execute()


def parse(arguments: list[str]) -> Verb:
    """The verb that a command line names, with its options."""
    if arguments and arguments[0] in PARSERS:
        return PARSERS[arguments[0]](arguments[1:])
    verbs: Any = Union[  # noqa: UP007, of a number that is not written here
        tuple(
            Annotated[verb, tyro.conf.subcommand(name)] for name, verb in VERBS.items()
        )
    ]
    options: Any = tyro.conf.OmitSubcommandPrefixes
    return tyro.cli(
        options[verbs],
        prog=PROGRAM,
        description=(__doc__ or "").split("\n")[0],
        args=arguments,
        config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff),
    )


@contextlib.contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, with a hint on how to continue."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        del number, frame
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
