"""Images of your own, in folders."""

import numpy as np
import pytest
from PIL import Image

from experiments.errors import ConfigError, DataError, DatasetMissing
from experiments.images.config import DataConfig, ImageConfig
from experiments.images.data import load
from experiments.images.kind import resolve


def draw(path, shade, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, shade).save(path)


@pytest.fixture
def place(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for shade, name in ((10, "cats"), (200, "dogs")):
            for index in range(count):
                draw(tmp_path / split / name / f"{index}.png", shade)
    (tmp_path / "train" / "cats" / "notes.txt").write_text("not an image")
    return tmp_path


def settings(place, **changes):
    options = {"side": 8, "batch_size": 2, **changes}
    return DataConfig(name="folder", folder=str(place), **options)


def test_classes_are_folders_and_the_middles_of_images_are_scaled(place):
    data = load(settings(place))
    assert (data.classes, data.shape, data.train.size) == (2, (8, 8, 3), 6)
    shades = data.train.arrays["image"].mean(axis=(1, 2, 3))
    np.testing.assert_array_equal(data.train.arrays["label"], shades > 100)
    assert data.evaluation.arrays["label"].tolist() == [0, 1]


def test_large_images_are_cut_when_they_are_needed(place):
    data = load(settings(place, side=0))
    assert data.shape == (224, 224, 3)
    assert data.evaluation.take([0])["image"].mean() == 10


def test_images_are_held_out_at_random(place):
    data = load(settings(place, validation=3))
    assert (data.train.size, data.evaluation.size) == (3, 3)
    assert len(set(data.evaluation.arrays["label"].tolist())) == 2


def test_what_a_folder_lacks_is_named(place, tmp_path):
    with pytest.raises(ConfigError, match=r"need --data\.folder"):
        load(DataConfig(name="folder"))
    with pytest.raises(DatasetMissing, match="there is no folder"):
        load(settings(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"hold images out with --data\.validation"):
        load(settings(place / "train"))
    with pytest.raises(DataError, match="at least two folders, one a class"):
        load(settings(place / "train" / "cats"))
    draw(place / "test" / "birds" / "0.png", 0)
    with pytest.raises(DataError, match="has the class 'birds', training not"):
        load(settings(place))
    (place / "test" / "birds" / "0.png").unlink()
    (place / "test" / "birds").rmdir()
    (place / "train" / "dogs" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        load(settings(place))


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused(place):
    ramp = np.linspace(0, 65535, 96).astype(np.uint16).reshape(12, 8)
    Image.fromarray(ramp).save(place / "test" / "cats" / "0.png")
    found = load(settings(place)).evaluation.arrays["image"][0].astype(int)
    assert abs(found.mean() - 127.5) < 3
    shades = Image.fromarray(np.linspace(0, 1, 96, dtype=np.float32).reshape(12, 8))
    shades.save(place / "test" / "dogs" / "1.tiff")
    with pytest.raises(DataError, match=r"1.tiff .* mode 'F' have no known range"):
        load(settings(place))


def test_a_colour_that_never_occurs_is_zero(place):
    for split in ("train", "test"):
        for file in (place / split).glob("*/*.png"):
            Image.new("RGB", (8, 8), (int(file.stem), 9, 0)).save(file)
    data = load(settings(place))
    normal = data.normalize(data.evaluation.arrays["image"])
    assert np.isfinite(normal).all()
    assert (normal[..., 2] == 0).all()


def test_a_run_keeps_the_names_of_its_classes(place):
    config = resolve(ImageConfig(data=settings(place)))
    assert config.data.labels == ("cats", "dogs")
    load(config.data)
    (place / "train" / "cats").rename(place / "train" / "felines")
    (place / "test" / "cats").rename(place / "test" / "felines")
    with pytest.raises(DataError, match=r"classes cats, dogs, .* got dogs, felines"):
        load(config.data)


def test_folders_that_are_no_classes_are_named(place):
    for name in ("cats", "dogs"):
        (place / "train" / name).rename(place / name)
    (place / "train").rmdir()
    with pytest.raises(DataError, match="a folder 'test' beside its classes"):
        load(settings(place, validation=2))
    (place / "test").rename(place.parent / f"{place.name}-test")
    load(settings(place, validation=2))
    (place / "birds").mkdir()
    with pytest.raises(DataError, match="birds holds no images"):
        load(settings(place, validation=2))


def test_images_are_read_as_viewers_show_them(place):
    lying = Image.new("L", (12, 8), 0)
    lying.paste(255, (0, 0, 6, 8))  # its left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left half is on top
    lying.save(place / "test" / "cats" / "0.png", exif=exif)
    ghost = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    ghost.save(place / "test" / "dogs" / "0.png")
    ghost.quantize(4).save(place / "test" / "dogs" / "1.png", transparency=0)
    upright, *transparent = load(settings(place)).evaluation.arrays["image"]
    assert upright[:3].min() > 200
    assert upright[5:].max() < 55
    np.testing.assert_array_equal(transparent, 255)


def test_hidden_files_are_no_images_and_folders_of_a_class_are(place):
    (place / "train" / "cats" / "._0.png").write_bytes(b"of macOS")
    draw(place / "train" / "cats" / ".thumbnails" / "0.png", 90)
    draw(place / "train" / "dogs" / "old" / "0.png", 201)
    shades = load(settings(place)).train.arrays["image"].mean(axis=(1, 2, 3))
    assert sorted(shades) == [10, 10, 10, 200, 200, 200, 201]


def test_images_that_were_trained_on_are_not_held_out_when_others_are_added(place):
    for index in range(40):
        draw(place / "train" / "cats" / f"cat{index}.png", index)
    before = load(settings(place, validation=12))
    trained = set(before.train.arrays["image"][:, 0, 0, 0].tolist())
    for index in range(8):
        draw(place / "train" / "cats" / f"new{index}.png", 100 + index)
    after = load(settings(place, validation=12))
    held = set(after.evaluation.arrays["image"][:, 0, 0, 0].tolist())
    assert held - {200, 10}
    assert not held & trained - {200, 10}
