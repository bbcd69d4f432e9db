import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.datasets import open_dataset
from experiments.errors import ConfigError, DataError, DatasetMissing
from experiments.images.augment import augment
from experiments.images.config import DataConfig
from experiments.images.data import load, read


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def digits(data_dir):
    return load(DataConfig(), data_dir)


def _images(*sources):
    return np.concatenate([source.arrays["image"] for source in sources])


def test_digits_are_those_of_scikit_learn(digits):
    assert digits.train.arrays["image"].shape == (1297, 8, 8, 1)
    assert digits.evaluation.arrays["image"].shape == (500, 8, 8, 1)
    assert (digits.shape, digits.classes) == ((8, 8, 1), 10)
    pixels = _images(digits.train, digits.evaluation)
    assert (pixels.min(), pixels.max()) == (0, 16)
    from sklearn.datasets import load_digits

    reference = load_digits().images.astype(np.uint8).reshape(1797, -1)
    ours = pixels.reshape(1797, -1)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, reference))


def test_the_split_is_stratified(digits):
    counts = np.bincount(digits.evaluation.arrays["label"])
    assert counts.min() >= 48
    assert counts.max() <= 51


def test_loading_twice_gives_the_same(digits, data_dir):
    again = load(DataConfig(), data_dir)
    one, other = (
        (d.train.arrays, d.evaluation.arrays, d.classes, d.mean, d.std)
        for d in (digits, again)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_validation_images_come_from_the_training_images(digits, data_dir):
    held = load(DataConfig(validation=300), data_dir)
    assert held.train.size == 997
    together = _images(held.train, held.evaluation)
    assert np.array_equal(together, digits.train.arrays["image"])


def test_too_many_validation_images_are_refused(data_dir):
    with pytest.raises(ConfigError, match="validation=1290 leaves 7 of 1297"):
        load(DataConfig(validation=1290), data_dir)


def test_a_missing_data_set_says_what_to_do(tmp_path):
    with pytest.raises(DatasetMissing, match="cifar10 is not in .*"):
        load(DataConfig(name="cifar10"), tmp_path)
    with pytest.raises(DatasetMissing, match="no data set is called 'cifar11'"):
        load(DataConfig(name="cifar11"), tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("index", "train holds 1297 examples, its index says 1000000000; prepare it"),
        ("records", "train holds 0 examples, its index says 1297; prepare it again"),
        ("removed", "train holds 0 examples, its index says 1297; prepare it again"),
        ("json", r"digits in .* cannot be opened: .*; prepare it again"),
    ],
)
def test_a_damaged_data_set_is_named_at_once(
    damage, message, digits, data_dir, tmp_path
):
    shutil.copytree(data_dir, tmp_path / "data")
    (about,) = (tmp_path / "data").rglob("dataset_info.json")
    (records,) = (tmp_path / "data").rglob("*train*array_record*")
    match damage:
        case "index":
            values = json.loads(about.read_text())
            for split in values["splits"]:
                split["shardLengths"] = ["1000000000"]
            about.write_text(json.dumps(values))
        case "records":
            records.write_bytes(records.read_bytes()[:1000])
        case "removed":
            records.unlink()
        case "json":
            about.write_text("{")
    with pytest.raises((DataError, ConfigError), match=message):
        load(DataConfig(), tmp_path / "data")


def test_cifar10_comes_through_the_same_loader(shared):
    builder = open_dataset("cifar10", shared / "datasets" / "tfds")
    arrays = read(builder, "train[:500]").arrays
    assert arrays["image"].shape == (500, 32, 32, 3)
    assert set(arrays["label"].tolist()) == set(range(10))
    # The published means of the channels; 500 images come within three deviations.
    means = arrays["image"].mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.491, 0.482, 0.447], atol=0.03)


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


def test_some_classes_are_a_task_of_their_own(digits, data_dir):
    half = load(DataConfig(classes=(7, 5)), data_dir)
    assert half.classes == 2
    for whole, part in (
        (digits.train, half.train),
        (digits.evaluation, half.evaluation),
    ):
        labels = whole.arrays["label"]
        chosen = np.isin(labels, (5, 7))
        np.testing.assert_array_equal(
            part.arrays["image"], whole.arrays["image"][chosen]
        )
        np.testing.assert_array_equal(part.arrays["label"], labels[chosen] == 5)
    with pytest.raises(ConfigError, match="classes must be below 10 for digits"):
        load(DataConfig(classes=(0, 10)), data_dir)
    with pytest.raises(ConfigError, match="classes must be empty for folder"):
        load(DataConfig(name="folder", classes=(0, 1)), data_dir)
    with pytest.raises(ConfigError, match="classes must be two or more numbers"):
        DataConfig(classes=(3,))
