"""The verbs of the command line and their options, one file each.

A verb is a frozen dataclass whose fields are its options and whose docstrings are its
help. `check` reports errors before jax is imported, which takes seconds; `execute` does
the work, mostly through `experiments.commands`, and imports what needs jax.
"""

from collections.abc import Callable
from typing import Protocol

from experiments.verbs.allocate import Allocate
from experiments.verbs.audit import Audit
from experiments.verbs.benchmark import Benchmark
from experiments.verbs.compare import Compare
from experiments.verbs.compress import Compress
from experiments.verbs.demo import Demo
from experiments.verbs.evaluate import Evaluate
from experiments.verbs.export import Export
from experiments.verbs.lottery import Lottery, parse_lottery
from experiments.verbs.recipes import Recipes
from experiments.verbs.report import Report
from experiments.verbs.shrink import Shrink
from experiments.verbs.tradeoff import Tradeoff
from experiments.verbs.train import Train, parse_train


class Verb(Protocol):
    """One command, with its options."""

    def check(self) -> None:
        """Raises a UserError if an option is wrong; needs no jax."""

    def execute(self) -> None:
        """Carries the command out."""


VERBS: dict[str, type[Verb]] = {
    "train": Train,
    "compress": Compress,
    "allocate": Allocate,
    "shrink": Shrink,
    "evaluate": Evaluate,
    "audit": Audit,
    "report": Report,
    "benchmark": Benchmark,
    "tradeoff": Tradeoff,
    "export": Export,
    "recipes": Recipes,
    "compare": Compare,
    "lottery": Lottery,
    "demo": Demo,
}
"""In the order of the help."""

PARSERS: dict[str, Callable[[list[str]], Verb]] = {
    "train": parse_train,
    "lottery": parse_lottery,
}
"""Of the verbs that take a configuration, whose fields are options."""
