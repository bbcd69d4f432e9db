"""What targets such as c50 and k90@cost ask of a network, read from its trace."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cram_jax import Projector, compose
from cram_jax.structure import Structure, channels, multiply_adds, small_shapes


@dataclass(frozen=True)
class CoupledChannels:
    """The channels of a network and the cost of its weights, traced when asked for.

    Attributes:
      trace: gives the structure of ``(params, batch_stats)``.
      pools: regular expressions for families, see `channels`. Each pool loses its share
        separately, because heads should not compete with hidden units. By default all
        families form one pool.
    """

    trace: Callable[[], Structure]
    pools: tuple[str | None, ...] = (None,)

    @cached_property
    def structure(self) -> Structure:
        """Of parameters and batch statistics."""
        return self.trace()

    @cached_property
    def of_params(self) -> Structure:
        """Of the parameters; one value, so that equal projectors are equal."""
        return self.structure.part(lambda variables: variables[0])

    @cached_property
    def scale(self) -> dict[str, float]:
        """One over the root of the multiply-adds of a weight, by the path of its leaf.

        Of the parameters that a layer multiplies its inputs by.
        """
        model = self.structure.model
        assert model is not None  # it is of the whole
        counts = multiply_adds(
            lambda variables, inputs: model.apply(variables, *inputs),
            model.variables,
            model.inputs,
        )
        sizes = {leaf.path: math.prod(leaf.shape) for leaf in self.structure.leaves}
        return {
            path.removeprefix("0/"): (sizes[path] / count) ** 0.5
            for path, count in counts.items()
            if path.startswith("0/")  # the parameters; 1 are the batch statistics
        }

    def projector(self, share: float) -> Projector:
        """Removes a share of the channels of every pool."""
        pruners = [channels(share, self.of_params, where=pool) for pool in self.pools]
        return pruners[0] if len(pruners) == 1 else compose(*pruners)


def parameter_shapes(structure: Structure, kept: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that are left, by path.

    Args:
      structure: of ``(params, batch_stats)``.
      kept: the groups that stay.
    """
    shapes = small_shapes(structure, kept).items()
    return {path[2:]: shape for path, shape in shapes if path.startswith("0/")}
