"""Configurations as stored in files, and the difference between two."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.images.config import ImageConfig
from experiments.kinds import CONFIGS

# Names of fields until 0.1, in stored runs.
RENAMED = {
    "targets": "eval_targets",
    "optimizer.method": "optimizer.rule",
    "optimizer.targets": "optimizer.train_targets",
}

WORDS = {float: "a number", int: "an integer", str: "text", bool: "true or false"}


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON values."""
    return {"kind": config.kind} | dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], base: RunConfig | None = None) -> Any:
    """Makes a configuration from what `to_dict` returned, by way of JSON or YAML.

    Args:
      values: what it returned. Without ``kind`` it is an `ImageConfig`; names of
        version 0.1 are understood.
      base: supplies what ``values`` lacks; by default the defaults.

    Returns:
      The configuration.

    Raises:
      ConfigError: a name is unknown, or a value of the wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a configuration must be an object, got {_shown(values)}")
    values = dict(values)
    kind = values.pop("kind", base.kind if base else ImageConfig.kind)
    if kind not in tuple(CONFIGS):
        known = ", ".join(CONFIGS)
        raise ConfigError(f"kind must be one of {known}, got {_shown(kind)}")
    if base is not None and base.kind != kind:
        raise ConfigError(f"kind must be {base.kind!r}, got {kind!r}")
    return _dataclass(CONFIGS[kind], _renamed(values), "", base)


def read_fields(cls: Any, values: Mapping[str, Any]) -> Any:
    """Makes a dataclass from the values in a file.

    Raises:
      ConfigError: a name is unknown, or a value of the wrong type or out of range.
    """
    return _dataclass(cls, values, "", None)


def differences(one: RunConfig, other: RunConfig) -> dict[str, Any]:
    """The fields in which two configurations differ, as the first has them."""
    first, second = _flat(to_dict(one)), _flat(to_dict(other))
    missing = object()  # in runs of another kind
    return {n: v for n, v in first.items() if v != second.get(n, missing)}


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """The same under today's names: rule "none" was the method "sgd"."""
    if isinstance(values.get("optimizer"), Mapping):
        values["optimizer"] = dict(values["optimizer"])
    for old, new in RENAMED.items():
        *parents, old_name = old.split(".")
        owner: Any = values
        for parent in parents:
            owner = owner.get(parent)
        if isinstance(owner, dict) and old_name in owner:
            owner[new.split(".")[-1]] = owner.pop(old_name)
            if new == "optimizer.rule" and owner["rule"] == "sgd":
                owner["rule"] = "none"
    return values


def _dataclass(cls: Any, values: Any, place: str, base: Any) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} must be an object, got {_shown(values)}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"it has {names}"
            raise ConfigError(f"{cls.__name__} has no {_shown(name)}; {meant}")
    made = {}
    for name, value in values.items():
        inner = f"{place}.{name}" if place else name
        if dataclasses.is_dataclass(hints[name]):
            made[name] = _dataclass(
                hints[name], value, inner, getattr(base, name, None)
            )
        else:
            made[name] = _value(hints[name], value, inner)
    return cls(**made) if base is None else dataclasses.replace(base, **made)


def _value(hint: Any, value: Any, place: str) -> Any:
    """A value of a field, if it is of the field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # X | None
        hint = next(a for a in arguments if a is not types.NoneType)
        return None if value is None else _value(hint, value, place)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{place} must be a list, got {_shown(value)}")
        return tuple(
            _value(arguments[0], v, f"{place}[{i}]") for i, v in enumerate(value)
        )
    if origin is typing.Literal:
        if value not in [a for a in arguments if type(a) is type(value)]:
            known = ", ".join(map(str, arguments))
            raise ConfigError(f"{place} must be one of {known}, got {_shown(value)}")
        return value
    allowed = (int, float) if hint is float else (hint,)
    if type(value) not in allowed:
        raise ConfigError(f"{place} must be {WORDS[hint]}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat
