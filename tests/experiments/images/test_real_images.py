"""One epoch on real images, from the stored data set to the evaluated network."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.batches import Examples
from experiments.config import variant
from experiments.datasets import open_dataset
from experiments.evaluation.evaluation import evaluate_target, make_evaluation
from experiments.images.data import Dataset, read
from experiments.images.task import classification
from experiments.recipes import cifar10_small
from experiments.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_an_epoch_on_512_images_of_cifar10_lowers_the_loss(shared, progress, tmp_path):
    builder = open_dataset("cifar10", shared / "datasets" / "tfds")
    images = read(builder, "train[:512]")
    pixels = images.arrays["image"].reshape(-1, 3)
    data = Dataset(
        train=images,
        evaluation=Examples(images.take(range(200))),
        classes=10,
        mean=pixels.mean(axis=0).astype(np.float32),
        std=pixels.std(axis=0).astype(np.float32),
    )
    config = variant(
        cifar10_small.config,
        "smoke",
        epochs=1,
        learning_rate=0.02,
        train_targets=("k50", "k70"),
    )
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, batch_size=16, calibration=128, evaluation_batch=64
        ),
        log_every=8,
    )
    task = classification(config, data)
    state = train(config, tmp_path / "run", data, task, progress)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert len(losses) == 4
    # Chance is log(10) = 2.30; 2.15 was seen.
    assert losses[-1] < 2.25
    evaluation = make_evaluation(config, data, task)
    for target in ("dense", "k50"):
        row = evaluate_target(evaluation, state.params, state.batch_stats, target, 2)
        assert row.recalibrated > 14  # 19 % was seen
