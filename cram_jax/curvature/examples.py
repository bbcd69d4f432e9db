"""The arguments of losses that are evaluated one example at a time."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cram_jax.projector import leaf_path


def check_names(examples: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
    """Raises unless both map names to values, and share no name.

    Args:
      examples: arguments of the loss that have the examples along axis 0.
      constants: arguments that are the same for all examples.

    Raises:
      TypeError: one of them is not a mapping.
      ValueError: a name is in both.
    """
    for name, value in (("examples", examples), ("constants", constants)):
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{name} must map names of arguments of loss_fn to arrays, got "
                f"{type(value).__name__}"
            )
    if both := sorted(examples.keys() & constants.keys()):
        raise ValueError(f"examples and constants must not both hold {both}")


def count_examples(examples: Mapping[str, Any]) -> int:
    """How many examples there are.

    Args:
      examples: arrays or trees of arrays by name, with the examples along axis 0.

    Returns:
      Their number, at least 1.

    Raises:
      ValueError: there is none, a leaf is a scalar, or leaves hold different numbers.
    """
    sizes = {}
    for path, leaf in jax.tree.leaves_with_path(dict(examples)):
        if jnp.ndim(leaf) < 1:
            raise ValueError(
                f"examples[{leaf_path(path)!r}] must have the examples along axis 0, "
                f"got a scalar; pass what is the same for all in constants"
            )
        sizes[leaf_path(path)] = jnp.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"examples must all be of one number, got {sizes}")
    size = max(sizes.values(), default=0)
    if size == 0:
        raise ValueError(f"examples must hold at least one example, got {sizes}")
    return size
