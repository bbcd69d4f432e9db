"""Configurations as JSON holds them, and in what two of them differ."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.images.config import Config
from experiments.text.config import TextConfig

KINDS = {cls.kind: cls for cls in (Config, TextConfig)}


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    return {"kind": config.kind} | dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], cls: type | None = None) -> Any:
    """Makes a configuration of what `to_dict` gave, by way of JSON.

    Args:
      values: what it gave.
      cls: the dataclass; by default that of the kind of run that ``values`` names,
        images where it names none, as earlier runs did not.

    Returns:
      The configuration.

    Raises:
      ConfigError: a name is unknown, or a value out of range.
    """
    if cls is None:
        values = dict(values)
        kind = values.pop("kind", Config.kind)
        if kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        cls = KINDS[kind]
    types = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(values) - set(names)):
        raise ConfigError(f"{cls.__name__} has no {unknown[0]!r}; it has {names}")

    def read(kind: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(kind):
            return from_dict(value, kind)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: read(types[name], value) for name, value in values.items()})


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """The names of the fields in which two configurations differ."""
    first, second = _flat(to_dict(one)), _flat(to_dict(other))
    missing = object()  # in runs of another kind
    return [name for name in first if first[name] != second.get(name, missing)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat
