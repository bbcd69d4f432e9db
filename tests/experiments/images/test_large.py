"""Large images: decoded and cropped by any number and kind of workers."""

import dataclasses
import io

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.batches import Examples
from experiments.config import OptimizerConfig
from experiments.datasets import open_dataset
from experiments.errors import ConfigError, DatasetMissing
from experiments.images.catalogue import CATALOGUE, TRANSFER_SETS
from experiments.images.config import DataConfig, ImageConfig, ModelConfig
from experiments.images.data import load
from experiments.images.large import LargeImages, middle, random_box
from experiments.images.task import classification
from experiments.sharding import assemble, make_mesh, own_rows
from experiments.training.loop import train

SIZES = [(240, 300), (400, 256), (230, 230), (500, 180), (64, 64)]


def pictures(count, seed):
    """Images of several sizes, each of one colour, and its number as the label."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        colour = generator.integers(0, 256, 3)
        image = np.broadcast_to(colour, (height, width, 3)).astype(np.uint8)
        yield {"image": image, "label": number % 5}


def files(count, seed):
    """`pictures` as PNG: tensorflow-datasets itself would encode with TensorFlow."""
    rows = []
    for row in pictures(count, seed):
        file = io.BytesIO()
        Image.fromarray(row["image"]).save(file, "png")
        file.seek(0)
        rows.append(row | {"image": file})
    return rows


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, store_rows):
    """A data set that tensorflow-datasets does not know, in its form."""
    folder = tmp_path_factory.mktemp("large")
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=5),
    }
    rows = {"train": files(11, 0), "test": files(7, 1)}
    store_rows(folder, "birdsnap", None, "1.0.0", features, rows)
    return folder


@pytest.fixture(scope="module")
def labels(data_dir):
    """The labels of a split as stored: tensorflow-datasets shuffles what it writes."""
    builder = open_dataset("birdsnap", data_dir)
    return lambda split: [row["label"] for row in builder.as_data_source(split=split)]


@pytest.fixture(scope="module")
def config():
    return DataConfig(name="transfer_birdsnap", batch_size=4, flip=True, shift=0)


@pytest.fixture(scope="module")
def data(config, data_dir):
    return load(config, data_dir)


def equal(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_a_data_set_on_disk_is_opened_not_read(data):
    assert (data.train.size, data.evaluation.size, data.classes) == (11, 7, 5)
    assert data.shape == (224, 224, 3)
    assert data.mean.max() < 130  # of ImageNet, out of 255


def test_images_are_cut_and_keep_their_labels(data):
    (batch,) = data.train.training_batches(4, seed=0, start=0, stop=1)
    assert batch["image"].shape == (4, 224, 224, 3)
    assert batch["image"].dtype == np.uint8
    # Of one colour each, so every part is.
    assert (batch["image"] == batch["image"][:, :1, :1]).all()
    rows = list(pictures(11, 0))
    colours = {tuple(row["image"][0, 0].tolist()): row["label"] for row in rows}
    for image, label in zip(batch["image"], batch["label"], strict=True):
        assert colours[tuple(image[0, 0].tolist())] == label


def test_the_order_is_that_of_images_in_memory(data, labels):
    stored = Examples({"label": np.array(labels("train"))})
    memory = stored.training_batches(4, seed=3, start=0, stop=4)
    disk = data.train.training_batches(4, seed=3, start=0, stop=4)
    for ours, theirs in zip(disk, memory, strict=True):
        assert ours["label"].tolist() == theirs["label"].tolist()


@pytest.mark.parametrize(("workers", "start"), [(0, 0), (0, 3), (2, 3)])
def test_a_batch_is_a_function_of_seed_and_step(workers, start, config, data, data_dir):
    whole = list(data.train.training_batches(4, seed=1, start=0, stop=5))
    images = load(config, data_dir, workers=workers).train
    rest = list(images.training_batches(4, seed=1, start=start, stop=5))
    assert len(rest) == 5 - start
    assert all(map(equal, whole[start:], rest))


def test_crops_differ_from_epoch_to_epoch_and_with_the_seed():
    ramp = np.arange(256 * 256, dtype=np.uint32).reshape(256, 256, 1) // 256
    source = [{"image": np.repeat(ramp.astype(np.uint8), 3, axis=2), "label": 0}]
    images = LargeImages(source, range(1))
    first, second = images.training_batches(1, seed=0, start=0, stop=2)
    (other,) = images.training_batches(1, seed=1, start=0, stop=1)
    assert not equal(first, second)
    assert not equal(first, other)


def test_a_process_reads_the_rows_of_its_devices(data):
    whole = list(data.train.training_batches(4, seed=1, start=0, stop=2))
    own = np.array([1, 2])
    mine = data.train.training_batches(4, seed=1, start=0, stop=2, positions=own)
    for ours, theirs in zip(mine, whole, strict=True):
        assert equal(ours, {name: array[own] for name, array in theirs.items()})


@pytest.mark.several_devices
def test_a_batch_over_a_mesh_is_the_whole_batch():
    mesh = make_mesh("data=2,fsdp=2", 8)
    own = own_rows(mesh, 8)
    assert own.tolist() == list(range(8))  # all devices are of this process
    array = np.arange(24).reshape(8, 3)
    whole = assemble(mesh, array, own, 8)
    assert whole.sharding.num_devices == 4
    np.testing.assert_array_equal(whole, array)


@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_evaluation_sees_every_image_once(size, data, labels):
    batches = list(data.evaluation.evaluation_batches(size))
    weights = np.concatenate([batch["weight"] for batch in batches])
    found = np.concatenate([batch["label"] for batch in batches])
    assert all(batch["image"].shape == (size, 224, 224, 3) for batch in batches)
    assert found[weights == 1].tolist() == labels("test")
    assert weights.sum() == 7


def test_evaluation_cuts_the_middle_of_the_image_with_its_short_side_256():
    # 512 x 256 is as it should be: 224 of 256 rows, the middle 224 of 512 columns.
    assert middle(512, 256) == (144, 16, 368, 240)
    assert middle(256, 512) == (16, 144, 240, 368)
    assert middle(1024, 512) == (288, 32, 736, 480)
    picture = np.zeros((256, 256, 3), np.uint8)
    picture[16:240, 16:240] = 200
    images = LargeImages([{"image": picture, "label": 1}], range(1))
    assert (images.take([0])["image"] == 200).all()


def test_grey_images_get_three_channels():
    grey = np.full((300, 300, 1), 7, np.uint8)
    images = LargeImages([{"image": grey, "label": 1}], range(1))
    assert (images.take([0])["image"] == 7).all()


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (1000, 20)])
def test_random_parts_lie_inside_and_have_the_sizes_they_should(size):
    width, height = size
    generator = np.random.default_rng(0)
    areas = []
    for left, top, right, bottom in (
        random_box(generator, width, height) for _ in range(300)
    ):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        ratio = (right - left) / (bottom - top)
        # Sides are rounded to pixels.
        assert 3 / 4 * 0.8 <= ratio <= 4 / 3 * 1.25
        areas.append((right - left) * (bottom - top) / (width * height))
    if width < 10 * height:
        assert min(areas) < 0.2
        assert max(areas) > 0.7


def test_validation_images_are_the_last_of_the_training_images(
    config, data_dir, labels
):
    held = load(dataclasses.replace(config, validation=3), data_dir)
    assert (held.train.size, held.evaluation.size) == (8, 3)
    assert held.evaluation.take(range(3))["label"].tolist() == labels("train")[8:]


def test_what_does_not_fit_is_named(config, data, data_dir, tmp_path):
    with pytest.raises(ConfigError, match="batch_size=12 is more than the 11 examples"):
        next(iter(data.train.training_batches(12, 0, 0, 1)))
    too_many = dataclasses.replace(config, validation=8)
    with pytest.raises(ConfigError, match="validation=8 leaves 3 of 11"):
        load(too_many, data_dir)
    with pytest.raises(DatasetMissing, match="no builder for it: store it there"):
        load(config, tmp_path)
    with pytest.raises(DatasetMissing, match=r"(?s)food101 .*tfds build food101"):
        load(dataclasses.replace(config, name="transfer_food101"), tmp_path)


def test_a_missing_split_is_named(store_rows, tmp_path):
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=5),
    }
    rows = {"train": files(2, 0), "test": files(2, 1)}
    store_rows(tmp_path, "fgvc_aircraft", None, "1.0.0", features, rows)
    config = DataConfig(name="transfer_aircraft", batch_size=1)
    with pytest.raises(ConfigError, match="must have the split validation, it has"):
        load(config, tmp_path)


def test_the_catalogue_agrees_with_tensorflow_datasets(tmp_path):
    unknown = {"fgvc_aircraft", "birdsnap", "caltech256"}  # to it
    for entry in CATALOGUE.values():
        if entry.dataset in unknown:
            continue
        builder = tfds.builder(entry.dataset, data_dir=tmp_path)
        label = builder.info.features["label"]
        assert label.num_classes == entry.classes, entry.dataset
    assert len(TRANSFER_SETS) == 12


def test_training_on_large_images_resumes_exactly(data, progress, tmp_path):
    config = ImageConfig(
        name="large",
        data=DataConfig(
            name="transfer_birdsnap",
            batch_size=4,
            shift=0,
            flip=True,
            calibration=4,
            evaluation_batch=4,
        ),
        model=ModelConfig(widths=(4,), blocks=(1,), patch=8),
        optimizer=OptimizerConfig(rule="none", warmup=0.0),
        epochs=2,
        evaluate_every=0,
        checkpoint_every=1,
    )
    task = classification(config, data)
    whole = train(config, tmp_path / "run", data, task, progress)
    assert int(whole.step) == 4
    last = tmp_path / "run" / "checkpoints" / "4"
    last.rename(tmp_path / "elsewhere")
    again = train(config, tmp_path / "run", data, task, progress, resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)
    result = task.evaluate(again.params, again.batch_stats, data.evaluation)
    assert 0 <= result["accuracy"] <= 100
