"""What training for a format buys: CrAM+ for one format each, and plain training.

    python -m experiments.studies.formats --seeds 0 1 2

Plain SGD takes twice as many steps, as its steps cost half; it is trained once and
rounded to every format. CrAM+ is trained once for each, with the rho of the digits
recipe, and once for all widths of nested quantisation together. Each training leaves a
JSON file in ``--out``: if stopped, the same command continues with the next one.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.config import variant
from experiments.images.config import ImageConfig
from experiments.recipes import digits
from experiments.studies.structured import remembered

FORMATS = ("2:4", "3bit", "2bit", "4bit@32", "mxfp4", "nvfp4", "k90+4bit")
NESTED = ("nested8", "nested4", "nested2")
BASE = dataclasses.replace(
    digits.config,
    evaluate_every=0,
    checkpoint_every=0,
    eval_targets=("dense", *FORMATS, *NESTED),
)


def trainings() -> dict[str, ImageConfig]:
    """Every training by its name; the formats of CrAM+ are its own."""

    def cram(name: str, *targets: str) -> ImageConfig:
        return variant(
            BASE, name, eval_targets=("dense", *targets), train_targets=targets
        )

    return {
        "SGD": variant(BASE, "sgd", epochs=2 * BASE.epochs, rule="none"),
        **{name: cram(f"cram-{name}", name) for name in (*FORMATS, "nested2")},
        "nested": cram("cram-nested", *NESTED),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what has not been trained, and prints the table."""
    every = trainings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainings", nargs="+", default=[*every], choices=every)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/formats"))
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args(arguments)
    print("| trained for | format | accuracy (%) |")
    print("| --- | --- | --- |")
    for name in options.trainings:
        runs = [
            remembered(
                dataclasses.replace(every[name], seed=seed),
                options.out,
                options.data_dir,
            )["recalibrated"]
            for seed in options.seeds
        ]
        for target in every[name].eval_targets:
            values = [run[target] for run in runs]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            shown = f"{np.mean(values):.1f} ({spread:.1f})"
            print(f"| {name} | {target} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
