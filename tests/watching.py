"""A projector that can be watched."""

import dataclasses

from cram_jax import Projector


@dataclasses.dataclass(frozen=True, repr=False)
class Watched(Projector):
    """Does what another projector does, and calls a function with it.

    Attributes:
      projector: the other.
      listener: ``(params, key, projection) -> None``.
    """

    projector: Projector
    listener: object

    def init(self, params):
        return self.projector.init(params)

    def project(self, params, state, key):
        projection, state = self.projector.project(params, state, key)
        self.listener(params, key, projection)
        return projection, state
