"""Projectors with a number that follows a schedule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cram_jax.projector import Params, Projection, Projector, check_projector
from cram_jax.validation import check_function, check_state


class ScheduledState(NamedTuple):
    """State of `scheduled`.

    Attributes:
      uses: int32 scalar, how often the projector was used.
      inner: state of the projector that ``make`` makes.
    """

    uses: jax.Array
    inner: Any


def scheduled(
    make: Callable[[Any], Projector], schedule: optax.Schedule
) -> "Scheduled":
    r"""A projector whose number, such as a sparsity, follows a schedule.

    Gradual pruning along the cubic of Zhu and Gupta, from :math:`s_i` to :math:`s_f`,

    .. math:: s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / T)^3

    is ``scheduled(top_k, optax.polynomial_schedule(s_i, s_f, 3, T, t_0))``.

    The schedule counts the uses of this projector: the steps of `cram`; but inside
    `cached` only the renewals, and inside `one_of` only the draws of this member. One
    compiled program serves every value.

    Sparsities are below 1. A compiled program cannot check that, and keeps one weight
    instead of none.

    It is for training. `compress` needs a projector with a fixed number, so give it the
    last one, such as ``top_k(0.9)``.

    Args:
      make: from a number, which may be traced, to a projector, such as `top_k`. The
        state of the projector must not depend on the number.
      schedule: from the number of uses so far to the number.

    Returns:
      A projector with the state `ScheduledState`.

    Raises:
      TypeError: ``make`` or ``schedule`` is not a function; at ``init``, ``make`` does
        not return a projector.

    Example:
      >>> projector = scheduled(top_k, optax.linear_schedule(0.0, 0.75, 2))
      >>> params = [jnp.array([[1.0, 2.0, 3.0, 4.0]])]
      >>> state = projector.init(params)
      >>> for _ in range(3):
      ...     (pruned, _), state = projector.project(params, state, None)
      ...     print(pruned[0])
      [[1. 2. 3. 4.]]
      [[0. 2. 3. 4.]]
      [[0. 0. 0. 4.]]

    Reference: Zhu and Gupta, To prune, or not to prune, 2017, arXiv 1710.01878.
    """
    check_function("make", make)
    check_function("schedule", schedule)
    return Scheduled(make, schedule)


@dataclass(frozen=True, repr=False)
class Scheduled(Projector):
    """See `scheduled`."""

    make: Callable[[Any], Projector]
    schedule: optax.Schedule

    @property
    def is_scheduled(self) -> bool:
        """True."""
        return True

    @property
    def only_masks(self) -> bool:
        """Whether the first projector only sets entries to zero."""
        return self._at(0).only_masks

    def changes(self, params: Params) -> list[bool]:
        """The leaves that the first projector may change."""
        return self._at(0).changes(params)

    def notes(self, params: Params) -> list[str]:
        """The notes of the first projector."""
        return self._at(0).notes(params)

    def init(self, params: Params) -> ScheduledState:
        """No uses yet."""
        return ScheduledState(jnp.zeros([], jnp.int32), self._at(0).init(params))

    def project(
        self, params: Params, state: ScheduledState, key: jax.Array | None
    ) -> tuple[Projection, ScheduledState]:
        """Applies the projector for the current value."""
        check_state(state, ScheduledState, self)
        projector = self._at(state.uses)
        projection, inner = projector.project(params, state.inner, key)
        return projection, ScheduledState(optax.safe_increment(state.uses), inner)

    def _at(self, uses: Any) -> Projector:
        number = self.schedule(uses)
        if isinstance(number, Projector):
            raise TypeError(f"schedule must return a number, got {number!r}")
        projector = self.make(number)
        check_projector("make(...)", projector)
        return projector
