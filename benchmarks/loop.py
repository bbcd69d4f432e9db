"""How much of the training loop the step takes: images in memory, augmented.

    python -m benchmarks.loop

Prints milliseconds per step of the compiled step by itself, called back to back on one
batch, and of the whole loop (`experiments.training.loop`): order and gathering of the
batches, metrics, progress. Both are differences of a longer and a shorter run, so that
compilation and the last checkpoint drop out.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import timing
from experiments.batches import Examples
from experiments.images.config import ImageConfig
from experiments.images.data import Dataset
from experiments.images.task import Task, classification
from experiments.recipes import IMAGE_RECIPES
from experiments.runs.metrics import make_console, progress_bar
from experiments.training.loop import train
from experiments.training.step import (
    TrainStep,
    init_state,
    make_train_step,
    steps_per_epoch,
)


def images(count: int) -> Dataset:
    """Noise with the shape of CIFAR-10."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = generator.integers(0, 10, count, np.int32)
    some = Examples({"image": pixels, "label": labels})
    ones = np.ones(3, np.float32)
    return Dataset(some, some, 10, 128 * ones, 64 * ones)


def step_alone(
    config: ImageConfig, data: Dataset, task: Task, step: TrainStep, count: int
) -> float:
    """Seconds for a number of steps on one batch."""
    state = init_state(config, data, task)
    batch = next(data.train.training_batches(config.data.batch_size, 0, 0, 1))
    begin = time.perf_counter()
    for _ in range(count):
        state, _ = step(state, batch)
    jax.block_until_ready(state.params)
    return time.perf_counter() - begin


def loop(
    config: ImageConfig, data: Dataset, task: Task, step: TrainStep, epochs: int
) -> float:
    """Seconds for a run of some epochs, without its evaluation."""
    config = dataclasses.replace(config, epochs=epochs)
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(make_console()) as progress,
    ):
        begin = time.perf_counter()
        train(config, Path(folder) / "run", data, task, progress, train_step=step)
        return time.perf_counter() - begin


def main() -> None:
    """Prints one line per configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--epochs",
        type=int,
        choices=range(2, 100),
        default=3,
        metavar="2...",
        help="of the longer run",
    )
    parser.add_argument("--steps", type=int, default=40, help="in an epoch")
    options = parser.parse_args()
    print(timing.machine(), end="\n\n")
    for name in ("cifar10_small_sgd", "cifar10_small"):
        config = dataclasses.replace(
            IMAGE_RECIPES[name], evaluate_every=0, checkpoint_every=0, log_every=20
        )
        data = images(options.steps * config.data.batch_size)
        task = classification(config, data)._replace(
            evaluate=lambda *_: {"accuracy": 0.0, "loss": 0.0}
        )
        step = make_train_step(config, data, task)
        step_alone(config, data, task, step, 1)  # compiles
        more = options.epochs * steps_per_epoch(config, data) - options.steps
        shares, alone, whole = [], [], []
        for _ in range(options.repeats):
            bare = [
                step_alone(config, data, task, step, n)
                for n in (options.steps, options.steps + more)
            ]
            full = [loop(config, data, task, step, n) for n in (1, options.epochs)]
            alone.append((bare[1] - bare[0]) / more)
            whole.append((full[1] - full[0]) / more)
            shares.append(alone[-1] / whole[-1])
        print(
            f"{name:20s} step {1e3 * np.median(alone):7.2f} ms, "
            f"loop {1e3 * np.median(whole):7.2f} ms, "
            f"share of the step {100 * np.median(shares):5.1f} % "
            f"({100 * min(shares):.1f} to {100 * max(shares):.1f})"
        )


if __name__ == "__main__":
    main()
