"""Errors that a user can fix: the command line prints only their message."""

import shlex
from pathlib import Path


class UserError(Exception):
    """Something the user can fix; the message says how."""


class ConfigError(UserError, ValueError):
    """A value in a configuration is not allowed."""


class DatasetMissing(UserError):
    """A data set is not where it was expected."""


class DataError(UserError):
    """A file of data does not hold what it should."""


class RunError(UserError):
    """A run directory is not what was asked for, or cannot be written."""


class NonFiniteLoss(UserError):
    """The loss of a step, or a weight after it, is not finite."""


class WeightsError(UserError):
    """A file of weights is missing, or does not hold what the model needs."""


class VocabularyError(UserError):
    """A vocabulary is missing, unreadable, or not the one of the weights."""


class Stopped(Exception):
    """A signal has ended a run at a checkpoint, perhaps its last.

    Attributes:
      signal: its number; the exit status is 128 more.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def command_line(*words: object) -> str:
    """A command of ours that works as printed."""
    return shlex.join(["python", "-m", "experiments", *map(str, words)])


def cannot_write(path: Path, error: Exception) -> RunError:
    """An error that a path cannot be written, with the system's reason."""
    return RunError(f"cannot write {path}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of an error's message: those of tensorstore and orbax are long."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
