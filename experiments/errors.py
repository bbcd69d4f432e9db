"""Errors that the user can put right: the command line prints their message alone."""


class UserError(Exception):
    """Something the user can put right; the message says how."""


class ConfigError(UserError, ValueError):
    """A value in a configuration is not allowed."""


class DatasetMissing(UserError):
    """A data set is not where it was looked for."""


class DataError(UserError):
    """A file of data does not hold what it should."""


class RunError(UserError):
    """A run directory is not what was asked for, or cannot be written."""


class NonFiniteLoss(UserError):
    """The loss of a step is infinite or not a number."""


class WeightsError(UserError):
    """A file of weights is missing, or does not hold what the model needs."""


class VocabularyError(UserError):
    """A vocabulary is missing, unreadable, or not the one of the weights."""
