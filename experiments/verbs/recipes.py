"""``recipes``: what ``train`` knows by name."""

from dataclasses import dataclass

from experiments.recipes import RECIPES, summary


@dataclass(frozen=True)
class Recipes:
    """List the recipes that train knows, one a line."""

    def check(self) -> None:
        """Nothing can be wrong."""

    def execute(self) -> None:
        """Prints a line a recipe."""
        for name, config in RECIPES.items():
            print(f"{name:<32} {summary(config)}")
