"""``lottery``: iterative magnitude pruning with rewinding."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.images.config import ImageConfig
from experiments.text.config import TextConfig
from experiments.verbs.common import start_jax
from experiments.verbs.configured import parse_configured

RULES = ("none", "sam", "cram", "cram_plus", "topk_plus")
"""Rules that leave the masks to the rounds."""


@dataclass(frozen=True, kw_only=True)
class Lottery:
    """Find lottery tickets: train, prune a fifth of what is left, rewind, and again.

    ``lottery RECIPE`` trains the dense network of a recipe in OUT/round0, then a
    sparser one in OUT/round1 and so on, each a whole training from the same early
    weights. Each is a run like any other. Every field of the configuration is an
    option. If it is stopped, the same command continues; it can add rounds too.
    """

    config: Path | None = None
    """A YAML or JSON file instead of a recipe, as for train."""
    rounds: int = 5
    """How often to prune; after n rounds 0.8^n of the weights are left."""
    share: float = 0.2
    """Share of the weights that are left that a round prunes."""
    rewind_step: int = 0
    """The step of the dense training that every round goes back to, with weights,
    momentum, learning rate and data as they were then."""
    scope: Literal["global", "layer"] = "global"
    """Whether weights are compared over all layers or each layer loses its share."""
    out: Path | None = None
    """Where the rounds go; by default runs/NAME-RULE-seedSEED-lottery."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default the user's cache."""
    mesh: str | None = None
    """Devices of this process to share the work, as for train."""

    def check(self) -> None:
        """The numbers are in range, and the rule leaves the masks alone."""
        config = self.configuration()
        config.check_inputs()
        rule = config.optimizer
        if rule.rule not in RULES:
            raise ConfigError(
                f"optimizer.rule must be one of {', '.join(RULES)}, as rounds prune, "
                f"got {rule.rule!r}"
            )
        if rule.keep_pruned:
            raise ConfigError("optimizer.keep_pruned must be left out: rounds set it")
        for name, least in (("rounds", 1), ("rewind_step", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )
        if not 0 < self.share < 1:
            raise ConfigError(f"share must be between 0 and 1, got {self.share}")

    def execute(self) -> None:
        """Trains all rounds that are missing; prints the table."""
        start_jax()
        from experiments.commands.lottery import Plan, lottery

        plan = Plan(self.rounds, self.share, self.rewind_step, self.scope)
        lottery(self.configuration(), plan, self.out, self.data_dir, mesh=self.mesh)

    def configuration(self) -> RunConfig:
        """The dense run's; its fields are options of the classes below."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LotteryImages(Lottery):
    """Of a network on images."""

    fields: Annotated[ImageConfig, tyro.conf.arg(name="")]

    def configuration(self) -> RunConfig:
        return self.fields


@dataclass(frozen=True, kw_only=True)
class LotteryText(Lottery):
    """Of a network on text."""

    fields: Annotated[TextConfig, tyro.conf.arg(name="")]

    def configuration(self) -> RunConfig:
        return self.fields


def parse_lottery(arguments: list[str]) -> Lottery:
    """Parses with the one configuration that is meant: its fields are options too."""
    made: Lottery = parse_configured("lottery", LotteryImages, LotteryText, arguments)
    return made
