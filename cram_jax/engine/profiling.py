"""The cost of the nodes of a network."""

import time
from dataclasses import dataclass

from cram_jax.engine.executor import Program


@dataclass(frozen=True)
class NodeProfile:
    """The cost of one node in a call.

    Attributes:
      name: of the node.
      kind: of its operation.
      seconds: the least of several runs, on one thread.
      multiply_adds: without the zeros that are skipped, but with the padding of the
        batch to whole vectors.
      nbytes: bytes of weights, and of tensors read and written.
    """

    name: str
    kind: str
    seconds: float
    multiply_adds: int
    nbytes: int


class Profile(tuple[NodeProfile, ...]):
    """The cost of every node; prints as a table, the most expensive first."""

    def __str__(self) -> str:
        total = sum(entry.seconds for entry in self)
        lines = [f"{'node':32} {'kind':14} {'ms':>8} {'%':>5} {'MMAC':>9} {'MB':>8}"]
        for entry in sorted(self, key=lambda e: -e.seconds):
            lines.append(
                f"{entry.name[:32]:32} {entry.kind[:14]:14} {1e3 * entry.seconds:8.3f} "
                f"{100 * entry.seconds / max(total, 1e-12):5.1f} "
                f"{entry.multiply_adds / 1e6:9.2f} {entry.nbytes / 1e6:8.2f}"
            )
        return "\n".join([*lines, f"{'all':32} {'':14} {1e3 * total:8.3f}"])


def timed(program: Program) -> float:
    """Wall seconds of one run."""
    start = time.perf_counter()
    program.run()
    return time.perf_counter() - start
