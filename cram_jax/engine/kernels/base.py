"""The base of kernels: options that choose the code, and names of arguments."""

from dataclasses import dataclass
from typing import ClassVar

from cram_jax.engine.code import Kernel, Value

LOWEST = -3.4028234e38
"""Where a maximum of floats starts."""


@dataclass(frozen=True)
class KernelSpec:
    """The code of a kernel is a function of the options and the instruction set.

    Attributes:
      arguments: names of the 64-bit words that it is called with.
    """

    arguments: ClassVar[tuple[str, ...]]

    def emit(self, k: Kernel) -> None:
        """Builds the body."""
        raise NotImplementedError


def share(k: Kernel, total: Value) -> tuple[Value, Value]:
    """The part of ``range(total)`` that this job does of ``jobs`` in all."""
    jobs = k.int_argument("jobs")
    start, _ = k.divide(k.times(total, k.job), jobs)
    stop, _ = k.divide(k.times(total, k.plus(k.job, 1)), jobs)
    return start, stop
