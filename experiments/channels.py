"""What targets such as c50 remove: the channels of a network, read from its trace."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from cram_jax import Projector
from cram_jax.structure import Structure, channels


@dataclass(frozen=True)
class CoupledChannels:
    """The channels of a network, traced when they are first asked for.

    Attributes:
      trace: gives the structure of ``(params, batch_stats)``.
      where: a regular expression for the families that may lose channels, see
        `channels`; None: all of them.
    """

    trace: Callable[[], Structure]
    where: str | None = None

    @cached_property
    def structure(self) -> Structure:
        """Of parameters and batch statistics."""
        return self.trace()

    @cached_property
    def of_params(self) -> Structure:
        """Of the parameters; one value, so that equal projectors are equal."""
        return self.structure.part(lambda variables: variables[0])

    def projector(self, share: float) -> Projector:
        """Removes a share of the channels, those of all layers together."""
        return channels(share, self.of_params, where=self.where)
