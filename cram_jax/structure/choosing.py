"""Which families of channels a projector removes from."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from cram_jax.structure.structure import Family, Structure

WhereFamily: TypeAlias = str | Sequence[str] | Callable[[Family], bool]
"""Names of axes, a regular expression for them, or ``family -> bool``."""


def choose(structure: Structure, where: Any) -> list[int]:
    """The numbers of the families that `where` chooses, at least one."""
    if not structure.families:
        reasons = dict.fromkeys(r for why in structure.frozen.values() for r in why)
        raise ValueError(
            f"structure has no channels that may be removed; all are frozen: "
            f"{'; '.join(reasons)} (print it to see which)"
        )
    if where is None:
        chosen = list(range(len(structure.families)))
    elif isinstance(where, tuple):
        chosen = sorted({_named_family(structure, name) for name in where})
    elif isinstance(where, str):
        chosen = _matching_families(structure, where)
    else:
        chosen = [n for n, family in enumerate(structure.families) if where(family)]
    if not chosen:
        raise ValueError(
            f"where={where!r} chooses none of {len(structure.families)} families of "
            f"channels"
        )
    return chosen


def _named_family(structure: Structure, name: str) -> int:
    for number, family in enumerate(structure.families):
        if name in family.names:
            return number
    reasons = structure.frozen.get(name)
    if reasons:
        raise ValueError(f"where names {name!r}, which is frozen: {'; '.join(reasons)}")
    names = [family.names[0] for family in structure.families if family.names]
    raise ValueError(
        f"where names {name!r}, which is no axis with channels; there are {names}"
    )


def _matching_families(structure: Structure, pattern: str) -> list[int]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"where must be a regular expression or names of axes, got {pattern!r}: "
            f"{error}"
        ) from error
    chosen = [
        number
        for number, family in enumerate(structure.families)
        if any(expression.search(name) for name in family.names)
    ]
    names = {name for family in structure.families for name in family.names}
    if not chosen and pattern in names | set(structure.frozen):
        raise ValueError(
            f"where={pattern!r} is a regular expression, which matches no axis; for "
            f"the axis of this name use where=[{pattern!r}]"
        )
    frozen = {n: r for n, r in structure.frozen.items() if expression.search(n)}
    if not chosen and frozen:
        why = ", ".join(f"{name}: {'; '.join(r)}" for name, r in frozen.items())
        raise ValueError(f"where={pattern!r} matches frozen axes only: {why}")
    return chosen
