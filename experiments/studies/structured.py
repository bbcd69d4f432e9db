"""Which training lets a network lose channels: CrAM+ for c25 c50 c75, and others.

    python -m experiments.studies.structured --seeds 0 1 2 3 4
    python -m experiments.studies.structured --recipe cifar10_small_channels \
        --init-from RUN --epochs 3 --learning-rate 0.05 --seeds 0

First every candidate of a method is trained once on fewer images and evaluated on those
held out (300 of the digits, 5,000 of CIFAR-10); the best mean over the dense network
and all targets is chosen. Then the chosen ones are trained on all training images, once
per seed, and evaluated on the test images. Each training leaves a JSON file in
``--out``: if stopped, the same command continues with the next one. Keep only files of
this program there.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.config import variant
from experiments.images.config import ImageConfig
from experiments.recipes import cifar10_small, digits
from experiments.reports.display import markdown_table
from experiments.studies.trainings import (
    base_of,
    remembered,
    results_of,
    spread,
    study_parser,
)

HELD_OUT = {digits.channels.name: 300, cifar10_small.channels.name: 5000}
"""Training images to choose settings on, for every recipe."""


def candidates(base: ImageConfig) -> dict[str, list[ImageConfig]]:
    """The settings of every method.

    A step with one gradient costs half, so there are twice as many. SGD keeps the
    weight decay with which the dense network is best, see the recipe. Gradual pruning
    trains a network for each target, which is evaluated only at that target.
    """
    decays = (5e-4, 5e-3, 2e-2)
    longer = 2 * base.epochs

    def sgd(decay: float) -> ImageConfig:
        name = f"sgd-decay{decay}"
        return variant(base, name, epochs=longer, rule="none", weight_decay=decay)

    def gradual(target: str) -> list[ImageConfig]:
        return [
            variant(
                base,
                f"gradual-{target}-decay{decay}",
                epochs=longer,
                rule="gradual",
                train_targets=(target,),
                weight_decay=decay,
            )
            for decay in decays[:2]
        ]

    return {
        "SGD": [sgd(5e-4)],
        "SGD, decay chosen": [sgd(decay) for decay in decays],
        "SAM": [
            variant(base, f"sam-rho{rho}", rule="sam", rho=rho, weight_decay=5e-4)
            for rho in (0.05, 0.1, 0.2)
        ],
        "CrAM+": [
            variant(base, f"cram-rho{rho}-decay{decay}", rho=rho, weight_decay=decay)
            for decay in decays[:2]
            for rho in (0.05, 0.1, 0.2)
        ],
        **{f"Gradual {target}": gradual(target) for target in base.eval_targets[1:]},
    }


def chosen(
    methods: dict[str, list[ImageConfig]],
    held_out: int,
    out: Path,
    data_dir: Path | None,
) -> Iterator[tuple[str, ImageConfig]]:
    """The candidate of each method that is best on so many held-out images."""
    for method, configs in methods.items():
        means = []
        for config in configs:
            data = dataclasses.replace(config.data, validation=held_out)
            found = remembered(dataclasses.replace(config, data=data), out, data_dir)
            rule = config.optimizer
            is_gradual = rule.rule == "gradual"
            names = rule.train_targets if is_gradual else config.eval_targets
            means.append(np.mean([found[name] for name in names]))
        yield method, configs[int(np.argmax(means))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what has not been trained, and prints the table."""
    assert __doc__
    parser = study_parser(__doc__, HELD_OUT, digits.channels.name, seeds=range(5))
    names = [*candidates(digits.channels)]
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    options = parser.parse_args(arguments)
    base = base_of(options)
    assert isinstance(base, ImageConfig)
    methods = candidates(base)
    out = results_of(options, "structured")
    if options.init_from and base.data.validation != HELD_OUT[options.recipe]:
        print(
            f"note: {options.init_from} has seen the images that settings are chosen "
            f"on; one trained with --data.validation {HELD_OUT[options.recipe]} has not"
        )
    best = chosen(
        {method: methods[method] for method in options.methods},
        HELD_OUT[options.recipe],
        out,
        options.data_dir,
    )
    rows = []
    for method, config in dict(best).items():
        data = dataclasses.replace(config.data, validation=0)
        seeded = [
            dataclasses.replace(config, seed=seed, data=data) for seed in options.seeds
        ]
        runs = [remembered(run, out, options.data_dir) for run in seeded]
        cells = [spread([run[target] for run in runs]) for target in base.eval_targets]
        rows.append([method, config.name, *cells])
    header = [f"{len(options.seeds)} seeds", "setting", *base.eval_targets]
    print("\n".join(markdown_table(header, rows, left=2)))


if __name__ == "__main__":
    main()
