"""What targets such as c50 remove: the channels of a network, read from its trace."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from cram_jax import Projector, compose
from cram_jax.structure import Structure, channels


@dataclass(frozen=True)
class CoupledChannels:
    """The channels of a network, traced when they are first asked for.

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

    def projector(self, share: float) -> Projector:
        """Removes a share of the channels of every pool."""
        pruners = [channels(share, self.of_params, where=pool) for pool in self.pools]
        return pruners[0] if len(pruners) == 1 else compose(*pruners)
