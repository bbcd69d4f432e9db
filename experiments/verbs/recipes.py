"""``recipes``: the runs that ``train`` knows by name."""

from dataclasses import dataclass

from experiments.recipes import RECIPES, summary


@dataclass(frozen=True)
class Recipes:
    """List the recipes that train knows, one per line."""

    def check(self) -> None:
        """There is nothing to check."""

    def execute(self) -> None:
        """Prints one line per recipe."""
        for name, config in RECIPES.items():
            print(f"{name:<32} {summary(config)}")
