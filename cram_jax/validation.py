"""Argument checks whose errors name the argument, its value and what was expected."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np


def holds(condition: Callable[[], Any]) -> bool:
    """Whether a condition on untraced numbers holds, while a function is traced, too.

    There, comparing an array that the function holds would give a tracer.
    """
    with jax.ensure_compile_time_eval():
        return bool(condition())


def check_integer(
    name: str, value: Any, minimum: int | None = None, maximum: int | None = None
) -> None:
    """Raises unless the value is an integer in the range; a bool is not an integer.

    Args:
      name: of the argument, for the error.
      value: what the user passed.
      minimum: the smallest value allowed; None if any.
      maximum: the largest value allowed; None if any.

    Raises:
      TypeError: the value is not an integer.
      ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if minimum is not None and maximum is not None:
        if not minimum <= value <= maximum:
            raise ValueError(
                f"{name} must be between {minimum} and {maximum}, got {value}"
            )
    elif minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    elif maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Raises unless the value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.number):
        raise TypeError(f"{name} must be a number above 0, got {value!r}")
    if not 0 < value < np.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value!r}")


def check_strength(name: str, value: Any) -> None:
    """Raises unless the value is a schedule, or one finite number of at least 0."""
    if callable(value) or isinstance(value, jax.core.Tracer):
        return
    kinds = float | int | np.floating | np.integer | np.ndarray | jax.Array
    if not isinstance(value, kinds) or isinstance(value, bool) or np.ndim(value):
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}")
    if not holds(lambda: 0 <= value < np.inf):
        raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raises a TypeError unless the value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    if value not in choices:
        expected = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_function(name: str, value: Any) -> None:
    """Raises a TypeError unless the value can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}")


def check_state(state: Any, kind: Any, owner: Any = None) -> None:
    """Raises a TypeError unless a state has the fields of a NamedTuple.

    Args:
      state: what the user passed.
      kind: the NamedTuple that it should be.
      owner: the projector whose state it is, for the error; None if a rule's.
    """
    # By the fields, as a notebook that reloads the package has two such classes.
    if getattr(state, "_fields", None) != kind._fields:
        raise_state(state, f"a {kind.__name__}", owner)


def raise_state(state: Any, expected: str, owner: Any = None) -> NoReturn:
    """Raises the TypeError for a state of another form; see `check_state`."""
    whose = "state" if owner is None else f"state of {owner!r}"
    kind = type(state).__name__
    form = f"{kind} of {len(state)}" if isinstance(state, tuple | list) else kind
    raise TypeError(
        f"{whose} must be {expected}, as init(params) returns it, got a {form}; "
        f"restore a checkpoint into init(params), with the projector it was saved with"
    )


def check_batches(name: str, value: Any) -> None:
    """Raises a TypeError if the value is one batch, which has examples for batches."""
    is_batch = hasattr(value, "shape") or isinstance(value, Mapping | str)
    if is_batch or not isinstance(value, Iterable):
        kind = "an array" if hasattr(value, "shape") else f"a {type(value).__name__}"
        raise TypeError(
            f"{name} must be an iterable of batches, got {kind}; put a single batch "
            f"into a list"
        )
