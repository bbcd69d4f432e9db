import functools
import operator

import jax
import numpy as np
import pytest

from experiments.batches import Examples
from experiments.compression.options import Layerwise, PrunerOptions
from experiments.compression.second_order import SecondOrder
from experiments.compression.targets import projector
from experiments.evaluation.evaluation import evaluate_target, make_evaluation

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def evaluation(config, data, task):
    """One, as its functions compile at first use."""
    return make_evaluation(config, data, task)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 23])
def test_accuracy_counts_every_image_and_no_other(count, data, task):
    images = Examples(data.evaluation.take(range(count)))
    params, batch_stats = task.init(3)
    together = task.evaluate(params, batch_stats, images)
    alone = [
        task.evaluate(params, batch_stats, Examples(images.take([i])))
        for i in range(count)
    ]
    for name in ("accuracy", "loss"):
        expected = np.mean([one[name] for one in alone])
        np.testing.assert_allclose(together[name], expected, rtol=1e-5)


def test_a_target_is_judged_before_and_after(evaluation, data, task):
    params, batch_stats = task.init(0)
    rows = [
        evaluate_target(evaluation, params, batch_stats, target)
        for target in ("dense", "k50", "2:4")
    ]
    assert [row.target for row in rows] == ["dense", "k50", "2:4"]
    dense = task.evaluate(params, batch_stats, data.evaluation)["accuracy"]
    assert rows[0].pruned == dense
    assert all(0 <= row.recalibrated <= 100 for row in rows)


@pytest.mark.parametrize("target", ["k70.5", "k50+3bit"])
def test_compiled_compression_is_that_of_the_library(target, evaluation, task):
    params, _ = task.init(0)
    chosen = projector(target)
    (expected, masks), _ = jax.jit(chosen.project)(params, chosen.init(params), None)
    ours = evaluation.compress(params, target)
    jax.tree.map(np.testing.assert_array_equal, ours.masks, masks)
    # Rounding to levels divides by a scale, which compilers reorder.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        ours.params,
        expected,
    )


def test_second_order_pruning_serves_images_too(config, data, task):
    """With the statistics of the dense model, and the loss of evaluation."""
    params, batch_stats = task.init(0)
    options = SecondOrder(gradients=16, block_size=4, damping=1e-3, recomputations=1)
    ours, masks = make_evaluation(config, data, task, PrunerOptions(options)).compress(
        params, "o50", batch_stats
    )
    sizes = [mask.size for mask in jax.tree.leaves(masks) if mask.ndim > 1]
    pruned = sum(int((~mask).sum()) for mask in jax.tree.leaves(masks))
    assert pruned == sum(sizes) // 2
    place = ("stage1_block1", "conv1", "kernel")
    before, after, mask = (
        functools.reduce(operator.getitem, place, tree)
        for tree in (params, ours, masks)
    )
    assert np.mean(before[mask] != after[mask]) > 0.5  # what is kept has moved
    assert not after[~mask].any()
    one = data.train.take([0])
    loss = jax.jit(task.evaluation_loss)(params, batch_stats, one)
    judged = task.evaluate(params, batch_stats, Examples(one))["loss"]
    assert loss == pytest.approx(judged, rel=1e-5)


def test_recalibration_averages_the_statistics_of_augmented_images(
    evaluation, data, task
):
    """The stem's statistics, by hand: one convolution of 16 images in two batches."""
    params, batch_stats = task.init(0)
    statistics = evaluation.recalibrate(params, batch_stats, 3)
    drawn = data.train.training_batches(8, 3, 0, 2)
    batches = zip(jax.random.split(jax.random.key(3), 2), drawn, strict=True)
    images = np.concatenate([task.augment(*both)["image"] for both in batches])
    images = (images.astype(np.float64) - data.mean) / data.std
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["stem"]["conv"]["kernel"], np.float64)
    outputs = sum(
        padded[:, i : i + 8, j : j + 8] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    halves = outputs.reshape(2, -1, outputs.shape[-1])
    stem = statistics["stem"]["norm"]
    np.testing.assert_allclose(stem["mean"], halves.mean(1).mean(0), atol=1e-4)
    np.testing.assert_allclose(stem["var"], halves.var(1).mean(0), rtol=1e-3)


def test_draws_of_calibration_images_are_random_and_repeatable(evaluation, task):
    params, batch_stats = task.init(0)

    def mean(draw):
        statistics = evaluation.recalibrate(params, batch_stats, draw)
        return statistics["stem"]["norm"]["mean"]

    np.testing.assert_array_equal(mean(0), mean(0))
    assert not np.array_equal(mean(0), mean(1))
    row = evaluate_target(evaluation, params, batch_stats, "k50", 3)
    assert len(row.draws) == 3
    assert row.recalibrated == np.mean(row.draws)


@pytest.mark.parametrize("target", ["w50", "rg2:4"])
def test_layerwise_pruning_serves_images(target, config, data, task):
    """It prunes what its plain twin does, and what it leaves is nearer to dense."""
    params, batch_stats = task.init(0)
    options = PrunerOptions(layerwise=Layerwise(examples=32, batch=16))
    evaluation = make_evaluation(config, data, task, options)
    ours, masks = evaluation.compress(params, target, batch_stats)
    twin = "2:4" if ":" in target else "u50"
    plain, others = evaluation.compress(params, twin)
    kept = [
        [int(mask.sum()) for mask in jax.tree.leaves(tree)] for tree in (masks, others)
    ]
    assert kept[0] == kept[1]
    if target != "w50":
        images = data.train.take(range(40))
        logits = jax.jit(task.predict)
        before = logits(params, batch_stats, images)

        def distance(model):
            return np.linalg.norm(logits(model, batch_stats, images) - before)

        assert distance(ours) < distance(plain)
