"""The methods that `compare` sets side by side, and the knob that is tuned for each."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.compression import targets
from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.recipes import RECIPES

ZEROS = frozenset({"global", "layer", "blocks", "n of m"})
ANY = ZEROS | {"quantised"}
SHARES = frozenset({"global", "layer"})


class Entry(NamedTuple):
    """A method on the bench.

    Attributes:
      label: its name in tables.
      evaluations: evaluations of the gradient that a step needs.
      changes: fields of the optimiser's configuration; those of its ``pruning`` begin
        with ``pruning.``.
      knob: the field that is tuned on held-out examples.
      values: of the knob that are tried: three for every method, as for CrAM+; see
        `is_relative`.
      forms: the forms of targets that a network is trained for one by one; empty: one
        network serves all targets.
      trains_for_all: whether that network is trained for the targets of the bench.
      is_relative: whether ``values`` are multiples of what `untuned` gives, since the
        right scale depends on the task.
    """

    label: str
    evaluations: int
    changes: Mapping[str, Any]
    knob: str
    values: tuple[float, ...]
    forms: frozenset[str] = frozenset()
    trains_for_all: bool = False
    is_relative: bool = False


METHODS: dict[str, Entry] = {
    "sgd": Entry("SGD", 1, {"rule": "none"}, "weight_decay", (5e-4, 5e-3, 2e-2)),
    "sam": Entry("SAM", 2, {"rule": "sam"}, "rho", (0.5, 1.0, 2.0), is_relative=True),
    "cram_plus": Entry(
        "CrAM+",
        2,
        {"rule": "cram_plus"},
        "rho",
        (0.5, 1.0, 2.0),
        trains_for_all=True,
        is_relative=True,
    ),
    "gradual": Entry(
        "gradual", 1, {"rule": "gradual"}, "pruning.end", (0.5, 0.75, 0.9), ZEROS
    ),
    "acdc": Entry(
        "AC/DC",
        1,
        {"rule": "acdc", "pruning.begin": 0.1},
        "pruning.every",
        (20, 40, 80),
        ZEROS,
    ),
    "ste": Entry(
        "STE",
        1,
        {"rule": "ste"},
        "learning_rate",
        (0.25, 0.5, 1.0),
        ANY,
        is_relative=True,
    ),
    "dpf": Entry("DPF", 1, {"rule": "dpf"}, "pruning.every", (8, 16, 32), ZEROS),
    "sr_ste": Entry(
        "SR-STE", 1, {"rule": "sr_ste"}, "pruning.strength", (2e-4, 2e-3, 2e-2), ANY
    ),
    "admm": Entry(
        "ADMM", 1, {"rule": "admm"}, "pruning.strength", (1e-3, 1e-2, 1e-1), ANY
    ),
    "safe": Entry(
        "SAFE",
        2,
        {"rule": "safe", "rho": 0.1},
        "pruning.strength",
        (1e-3, 1e-2, 1e-1),
        ANY,
    ),
    "rigl": Entry(
        "RigL", 1, {"rule": "rigl"}, "pruning.replaced", (0.1, 0.3, 0.5), SHARES
    ),
    "set": Entry(
        "SET", 1, {"rule": "set"}, "pruning.replaced", (0.1, 0.3, 0.5), SHARES
    ),
    "platon": Entry(
        "PLATON",
        1,
        {"rule": "platon", "pruning.every": 10},
        "pruning.end",
        (0.5, 0.75, 0.9),
        SHARES,
    ),
    "str": Entry("STR", 1, {"rule": "str"}, "pruning.score", (-4, -3, -2), SHARES),
    "movement": Entry(
        "movement",
        1,
        {"rule": "movement", "pruning.begin": 0.1},
        "pruning.score_rate",
        (1e-3, 1e-2, 1e-1),
        SHARES,
    ),
    "soft_movement": Entry(
        "soft movement",
        1,
        {"rule": "soft_movement", "pruning.score_rate": 1e-2},
        "pruning.strength",
        (1.0, 10.0, 100.0),
        SHARES,
    ),
    "l0": Entry(
        "L0",
        1,
        {"rule": "l0", "pruning.score": 2.197, "pruning.score_rate": 1e-1},
        "pruning.strength",
        (1e-2, 1e-1, 1.0),
        SHARES,
    ),
    "sfw": Entry(
        "SFW",
        1,
        {"rule": "sfw", "learning_rate": 0.05},
        "pruning.radius",
        (3.0, 10.0, 30.0),
        SHARES,
    ),
}
"""By the names that ``compare --methods`` takes."""

MAIN: tuple[str, ...] = (
    "sgd",
    "sam",
    "cram_plus",
    "gradual",
    "acdc",
    "ste",
    "safe",
    "rigl",
)
"""The eight that matter most, for data where a training takes long."""


def trained_targets(entry: Entry, names: tuple[str, ...]) -> tuple[str | None, ...]:
    """What networks are trained for, in order; None: for all targets."""
    if not entry.forms:
        return (None,)
    return tuple(
        name
        for name in names
        if all(part.form in entry.forms for part in targets.parse(name))
    )


def tried_values(entry: Entry, base: RunConfig) -> tuple[float, ...]:
    """The values of a method's knob that are tried on a task."""
    if not entry.is_relative:
        return entry.values  # some are integers
    scale = _of_recipe(entry, base)
    return tuple(scale * value for value in entry.values)


def untuned(entry: Entry, base: RunConfig) -> float:
    """The value of a method's knob where none is tuned.

    That of the recipe, or, for SAM, of the recipe's variant with SAM; the second of the
    values that would be tried if the recipe has none.
    """
    if entry.knob in ("learning_rate", "weight_decay") or entry.is_relative:
        return _of_recipe(entry, base)
    return entry.values[1]


def _of_recipe(entry: Entry, base: RunConfig) -> float:
    if entry.changes["rule"] == "sam":
        with_sam = RECIPES.get(f"{base.name}_sam")
        return with_sam.optimizer.rho if with_sam else base.optimizer.rho / 2
    return float(getattr(base.optimizer, entry.knob))


def configured(
    base: RunConfig,
    entry: Entry,
    target: str | None,
    names: tuple[str, ...],
    *,
    budget: int,
    value: float,
) -> RunConfig:
    """A run of a method.

    Args:
      base: the task.
      entry: the method.
      target: what the network is trained for; None: see `Entry`.
      names: the targets of the bench.
      budget: evaluations of the gradient, in passes over the examples.
      value: of the knob.

    Returns:
      The configuration, with seed 0.
    """
    changes = dict(entry.changes) | {entry.knob: value}
    own = {
        name.removeprefix("pruning."): changes.pop(name)
        for name in list(changes)
        if name.startswith("pruning.")
    }
    if target is not None:
        changes["train_targets"] = (target,)
        names = (target,)
    elif entry.trains_for_all:
        changes["train_targets"] = tuple(name for name in names if name != "dense")
    pruning = dataclasses.replace(base.optimizer.pruning, **own)
    optimizer = dataclasses.replace(base.optimizer, pruning=pruning, **changes)
    word = re.sub(r"\W", "_", target or "all")
    return dataclasses.replace(
        base,
        name=f"{entry.changes['rule']}-{word}",
        optimizer=optimizer,
        epochs=max(budget // entry.evaluations, 1),
        eval_targets=names,
        evaluate_every=0,
        patience=0,
    )


def check_methods(names: tuple[str, ...]) -> None:
    """Raises a ConfigError unless all are methods of the bench, each once."""
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"methods must be of {', '.join(METHODS)}, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"methods must be some, each once, got {' '.join(names)!r}")
