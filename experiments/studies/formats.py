"""What training for a format buys: CrAM+ for one format each, and plain training.

    python -m experiments.studies.formats --seeds 0 1 2
    python -m experiments.studies.formats --recipe cifar10_small --seeds 0
    python -m experiments.studies.formats --recipe sst2_small --init-from RUN --epochs 1

Plain training takes twice as many steps, as its steps cost half; it is done once and
rounded to every format. CrAM+ is trained once for each, with the rho of the recipe, and
once for all widths of nested quantisation together. Each training leaves a JSON file in
``--out``: if stopped, the same command continues with the next one.
"""

import dataclasses
from collections.abc import Sequence

from experiments.config import RunConfig, variant
from experiments.recipes import cifar10_small, digits, sst2
from experiments.reports.display import markdown_table
from experiments.studies.trainings import (
    base_of,
    remembered,
    results_of,
    spread,
    study_parser,
)

FORMATS = ("2:4", "3bit", "2bit", "4bit@32", "mxfp4", "nvfp4", "k90+4bit")
NESTED = ("nested8", "nested4", "nested2")


RECIPES = (digits.config.name, cifar10_small.config.name, sst2.small.name)


def trainings(base: RunConfig) -> dict[str, RunConfig]:
    """Every training by its name; the formats of CrAM+ are its own."""

    def cram(name: str, *targets: str) -> RunConfig:
        return variant(
            base, name, eval_targets=("dense", *targets), train_targets=targets
        )

    plain = variant(
        base,
        "plain",
        epochs=2 * base.epochs,
        eval_targets=("dense", *FORMATS, *NESTED),
        rule="none",
    )
    return {
        "plain": plain,
        **{name: cram(f"cram-{name}", name) for name in (*FORMATS, *NESTED)},
        "nested": cram("cram-nested", *NESTED),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what has not been trained, and prints the table."""
    assert __doc__
    parser = study_parser(__doc__, RECIPES, digits.config.name, seeds=(0, 1, 2))
    names = [*trainings(digits.config)]
    parser.add_argument("--trainings", nargs="+", default=names, choices=names)
    options = parser.parse_args(arguments)
    out = results_of(options, "formats")
    every = trainings(base_of(options))
    rows = []
    for name in options.trainings:
        seeded = [dataclasses.replace(every[name], seed=s) for s in options.seeds]
        runs = [remembered(config, out, options.data_dir) for config in seeded]
        for target in every[name].eval_targets:
            accuracy = spread([run[target] for run in runs])
            rows.append([name, target, accuracy])
    header = ["trained for", "format", "accuracy (%)"]
    print("\n".join(markdown_table(header, rows, left=2)))


if __name__ == "__main__":
    main()
