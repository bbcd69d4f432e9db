"""How a configuration says what is wrong with a value."""

from typing import Any

from experiments import targets as targets_module
from experiments.errors import ConfigError


def check(config: Any, name: str, holds: Any, expected: str) -> None:
    """Raises unless a field holds what is expected.

    Raises:
      ConfigError: it names the field, what is expected and the value.
    """
    if not holds:
        raise ConfigError(f"{name} must be {expected}, got {getattr(config, name)!r}")


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raises unless numbers are at least ``least``, see `check`."""
    for name in names:
        check(config, name, getattr(config, name) >= least, f"at least {least}")


def check_targets(config: Any, *, training: bool) -> None:
    """Raises unless every entry of ``targets`` names one, see `targets.check`."""
    for target in config.targets:
        targets_module.check(target, training=training)
