import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import DataConfig
from experiments.data.augment import augment
from experiments.data.images import (
    Images,
    evaluation_batches,
    load,
    open_dataset,
    read,
    training_batches,
)
from experiments.errors import ConfigError, DatasetMissing


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def digits(data_dir):
    return load(DataConfig(), data_dir)


def _numbered(count):
    return Images(
        np.zeros((count, 2, 2, 1), np.uint8), np.arange(count, dtype=np.int32)
    )


def _labels(batches):
    return [batch["label"].tolist() for batch in batches]


def test_digits_are_those_of_scikit_learn(digits):
    assert digits.train.images.shape == (1297, 8, 8, 1)
    assert digits.evaluation.images.shape == (500, 8, 8, 1)
    assert digits.classes == 10
    pixels = np.concatenate([digits.train.images, digits.evaluation.images])
    assert (pixels.min(), pixels.max()) == (0, 16)
    from sklearn.datasets import load_digits

    reference = load_digits().images.astype(np.uint8).reshape(1797, -1)
    ours = pixels.reshape(1797, -1)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, reference))


def test_the_split_is_stratified(digits):
    counts = np.bincount(digits.evaluation.labels)
    assert counts.min() >= 48
    assert counts.max() <= 51


def test_loading_twice_gives_the_same(digits, data_dir):
    again = load(DataConfig(), data_dir)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(digits), jax.tree.leaves(again), strict=True)
    )


def test_validation_images_come_from_the_training_images(digits, data_dir):
    held = load(DataConfig(validation=300), data_dir)
    assert len(held.train.labels) == 997
    together = np.concatenate([held.train.images, held.evaluation.images])
    assert np.array_equal(together, digits.train.images)


def test_too_many_validation_images_are_refused(data_dir):
    with pytest.raises(ConfigError, match="validation=1290 leaves 7 of 1297"):
        load(DataConfig(validation=1290), data_dir)


def test_a_missing_data_set_says_what_to_do(tmp_path):
    with pytest.raises(DatasetMissing, match="cifar10 is not in .*"):
        load(DataConfig(name="cifar10"), tmp_path)
    with pytest.raises(DatasetMissing, match="no data set is called 'cifar11'"):
        load(DataConfig(name="cifar11"), tmp_path)


def test_cifar10_comes_through_the_same_loader(shared):
    builder = open_dataset("cifar10", shared / "datasets" / "tfds")
    images = read(builder, "train[:500]")
    assert images.images.shape == (500, 32, 32, 3)
    assert set(images.labels.tolist()) == set(range(10))
    # The published means of the channels; 500 images come within three deviations.
    means = images.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.491, 0.482, 0.447], atol=0.03)


def test_an_epoch_is_a_permutation_without_its_last_partial_batch():
    epochs = _labels(training_batches(_numbered(11), 3, seed=0, start=0, stop=6))
    first, second = (list(itertools.chain(*epochs[i : i + 3])) for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 9
    assert first != second


def test_the_order_is_a_function_of_seed_and_step():
    whole = _labels(training_batches(_numbered(11), 3, seed=5, start=0, stop=9))
    for start in range(9):
        rest = training_batches(_numbered(11), 3, seed=5, start=start, stop=9)
        assert _labels(rest) == whole[start:]
    other = _labels(training_batches(_numbered(11), 3, seed=6, start=0, stop=9))
    assert other != whole


@pytest.mark.parametrize("count", [1, 5, 6, 7])
def test_evaluation_sees_every_image_once(count):
    batches = list(evaluation_batches(_numbered(count), 3))
    assert all(batch["image"].shape == (3, 2, 2, 1) for batch in batches)
    labels = np.concatenate([batch["label"] for batch in batches])
    weights = np.concatenate([batch["weight"] for batch in batches])
    assert labels[weights == 1].tolist() == list(range(count))


def test_shifts_move_whole_images_by_at_most_the_shift():
    image = jnp.arange(1, 26, dtype=jnp.uint8).reshape(1, 5, 5, 1)
    images = jnp.repeat(image, 64, axis=0)
    moved = augment(jax.random.key(0), images, shift=1)
    assert moved.dtype == images.dtype
    padded = np.pad(np.asarray(image[0]), ((1, 1), (1, 1), (0, 0)))
    allowed = {
        padded[top : top + 5, left : left + 5].tobytes()
        for top in range(3)
        for left in range(3)
    }
    seen = {np.asarray(one).tobytes() for one in moved}
    assert seen == allowed  # 64 draws of 9: each is missed with probability 5e-4


def test_flips_mirror_some_images():
    images = jnp.arange(2, dtype=jnp.uint8).reshape(1, 1, 2, 1).repeat(32, axis=0)
    flipped = augment(jax.random.key(0), images, flip=True)[:, 0, 0, 0]
    assert set(flipped.tolist()) == {0, 1}


def test_without_augmentation_images_stay():
    images = jnp.ones((2, 3, 3, 1), jnp.uint8)
    assert augment(jax.random.key(0), images) is images
