"""What several verbs need before jax is imported."""

import difflib
import sys
from pathlib import Path
from typing import Any

from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.images.config import ImageConfig
from experiments.recipes import RECIPES

PROGRAM = "python -m experiments"


def recipe_named(name: Any) -> RunConfig:
    """A recipe; an unknown name raises an error that suggests similar ones."""
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, 3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"no recipe is called {name!r}; {meant}{PROGRAM} recipes lists them"
        )
    return RECIPES[name]


def check_named(run: Path, config: RunConfig, named: str | None) -> None:
    """Code that a stored configuration names is run only if the user names it too."""
    stored = config.model.module if isinstance(config, ImageConfig) else ""
    if stored and named != stored:
        raise ConfigError(
            f"{run} is of the network {stored}, whose code runs only if you name it "
            f"too: add --module {stored} (for train --model.module {stored})"
        )


def start_jax() -> None:
    """Imports jax, with a compilation cache that commands share unless one is set."""
    print("starting jax ...", file=sys.stderr, flush=True)
    import jax

    from experiments.datasets import default_data_dir

    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        folder = default_data_dir() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
