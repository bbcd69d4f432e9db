"""Verbs that take a configuration, all of whose fields are options."""

import json
import re
from pathlib import Path
from typing import Any

import tyro

from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.recipes import RECIPES
from experiments.runs.stored_config import from_dict
from experiments.text.config import TextConfig
from experiments.verbs.common import PROGRAM, check_named, recipe_named


def parse_configured(verb: str, images: Any, text: Any, arguments: list[str]) -> Any:
    """Parses with the one configuration that is meant.

    Args:
      verb: its name.
      images: its dataclass, with an `ImageConfig` in ``fields``.
      text: the same with a `TextConfig`.
      arguments: a recipe, ``--config FILE`` or ``--resume RUN``, and options.

    Returns:
      One of the two.

    Raises:
      ConfigError: no configuration is named, or more than one.
    """
    base, rest = _base(verb, arguments)
    shape = text if isinstance(base, TextConfig) else images
    return tyro.cli(
        shape,
        prog=f"{PROGRAM} {verb} RECIPE",
        description=(
            f"{shape.__mro__[1].__doc__}\n\nShown are the options of {base.name}."
        ),
        default=shape(fields=base),
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _base(verb: str, arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """The configuration that options change, and the options."""
    recipe = arguments[0] if arguments and not arguments[0].startswith("-") else None
    resume, file = _option(arguments, "--resume"), _option(arguments, "--config")
    named = [name for name in (recipe, resume, file) if name is not None]
    if len(named) > 1:
        raise ConfigError(
            f"{verb} needs one of a recipe, --config and --resume, got "
            f"{' and '.join(named)}"
        )
    if resume is not None:
        from experiments.runs.directory import load_config

        stored = load_config(Path(resume))
        check_named(Path(resume), stored, _option(arguments, "--model.module"))
        return stored, arguments
    if file is not None:
        return _read_config(Path(file)), arguments
    if recipe is None:
        if {"-h", "--help"} & set(arguments):
            return RECIPES["digits"], arguments
        raise ConfigError(
            f"{verb} needs a recipe, such as digits; {PROGRAM} recipes lists them"
        )
    return recipe_named(recipe), arguments[1:]


def _read_config(file: Path) -> RunConfig:
    import yaml

    try:
        text = file.read_text(encoding="utf-8-sig")
        is_json = file.suffix == ".json"
        values = json.loads(text) if is_json else yaml.load(text, _yaml_loader())
        if not isinstance(values, dict):
            raise ConfigError(f"it must hold fields, got {type(values).__name__}")
        recipe = values.pop("recipe", None)
        base = None if recipe is None else recipe_named(recipe)
        config: RunConfig = from_dict(values, base)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read {file}: {reason}") from error
    return config


NUMBERS = {
    "int": r"[-+]?[0-9][0-9_]*$",
    "float": r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$",
}


def _yaml_loader() -> Any:
    """Reads numbers as YAML 1.2 does: 1e-3 is one, and 2:4 is none."""
    import yaml

    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    tags = {f"tag:yaml.org,2002:{name}": form for name, form in NUMBERS.items()}
    loader.yaml_implicit_resolvers = {
        first: [entry for entry in known if entry[0] not in tags]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, form in tags.items():
        loader.add_implicit_resolver(tag, re.compile(form), [*"-+.0123456789"])
    return loader


def _option(arguments: list[str], name: str) -> str | None:
    """The value of an option that is needed before the others can be parsed."""
    for index, word in enumerate(arguments):
        if word == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
