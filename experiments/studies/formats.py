"""What training for a format buys: CrAM+ for one format each, and plain training.

    python -m experiments.studies.formats --seeds 0 1 2
    python -m experiments.studies.formats --recipe cifar10_small --seeds 0

Plain SGD takes twice as many steps, as its steps cost half; it is trained once and
rounded to every format. CrAM+ is trained once for each, with the rho of the recipe, and
once for all widths of nested quantisation together. Each training leaves a JSON file in
``--out``: if stopped, the same command continues with the next one.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from experiments.config import variant
from experiments.images.config import ImageConfig
from experiments.recipes import cifar10_small, digits
from experiments.studies.structured import remembered, spread

FORMATS = ("2:4", "3bit", "2bit", "4bit@32", "mxfp4", "nvfp4", "k90+4bit")
NESTED = ("nested8", "nested4", "nested2")


def trainings(recipe: ImageConfig) -> dict[str, ImageConfig]:
    """Every training by its name; the formats of CrAM+ are its own."""
    base = dataclasses.replace(
        recipe,
        evaluate_every=0,
        checkpoint_every=0,
        eval_targets=("dense", *FORMATS, *NESTED),
    )

    def cram(name: str, *targets: str) -> ImageConfig:
        return variant(
            base, name, eval_targets=("dense", *targets), train_targets=targets
        )

    return {
        "SGD": variant(base, "sgd", epochs=2 * base.epochs, rule="none"),
        **{name: cram(f"cram-{name}", name) for name in (*FORMATS, "nested2")},
        "nested": cram("cram-nested", *NESTED),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what has not been trained, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recipes = {recipe.name: recipe for recipe in (digits.config, cifar10_small.config)}
    parser.add_argument("--recipe", default="digits", choices=recipes)
    names = [*trainings(digits.config)]
    parser.add_argument("--trainings", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="by default runs/formats/RECIPE")
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args(arguments)
    out = options.out or Path("runs/formats") / options.recipe
    every = trainings(recipes[options.recipe])
    rows = ["| trained for | format | accuracy (%) |", "| --- | --- | --- |"]
    for name in options.trainings:
        seeded = [dataclasses.replace(every[name], seed=s) for s in options.seeds]
        runs = [
            remembered(config, out, options.data_dir)["recalibrated"]
            for config in seeded
        ]
        for target in every[name].eval_targets:
            accuracy = spread([run[target] for run in runs])
            rows.append(f"| {name} | {target} | {accuracy} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
