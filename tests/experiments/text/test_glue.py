"""GLUE: the table of tasks, reading and encoding."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.errors import ConfigError, DataError, DatasetMissing
from experiments.text.glue import TASKS, Texts, encode, glue_task, read_glue, truncate
from experiments.text.tokenization import load_wordpiece

WORDS = "[PAD] [UNK] [CLS] [SEP] a cat the sat"


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(WORDS.split()))
    return load_wordpiece(file)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, store_rows):
    """A few rows of a task with pairs and of the regression."""
    tasks = {
        "rte": [("a cat sat", "the cat", 1), ("the", "a", 0), ("sat", "sat sat", 1)],
        "stsb": [("a cat", "the cat", 3.8), ("sat", "a", 0.0)],
    }
    kinds = {"rte": tfds.features.ClassLabel(num_classes=2), "stsb": np.float32}
    folder = tmp_path_factory.mktemp("glue")
    names, text = ("sentence1", "sentence2", "label"), tfds.features.Text()
    for name, rows in tasks.items():
        hidden = [(*texts, -1) for *texts, _ in rows]
        splits = {"train": rows, "validation": rows[:1], "test": hidden}
        store_rows(
            folder,
            "glue",
            name,
            "2.0.0",
            dict(zip(names, (text, text, kinds[name]), strict=True)),
            {
                split: [dict(zip(names, row, strict=True)) for row in rows]
                for split, rows in splits.items()
            },
        )
    return folder


def test_a_pair_is_read_with_its_label(wordpiece, data_dir):
    data = encode(read_glue("rte", "train", data_dir), wordpiece, 8)
    rows = {
        tuple(ids): (types.tolist(), mask.sum(), label)
        for ids, types, mask, label in zip(
            data["input_ids"].tolist(),
            data["token_type_ids"],
            data["attention_mask"],
            data["label"],
            strict=True,
        )
    }
    assert rows == {
        (2, 4, 5, 7, 3, 6, 5, 3): ([0, 0, 0, 0, 0, 1, 1, 1], 8, 1),
        (2, 6, 3, 4, 3, 0, 0, 0): ([0, 0, 0, 1, 1, 0, 0, 0], 5, 0),
        (2, 7, 3, 7, 7, 3, 0, 0): ([0, 0, 0, 1, 1, 1, 0, 0], 6, 1),
    }
    assert {array.dtype for array in data.values()} == {np.dtype(np.int32)}


def test_a_regression_has_numbers(wordpiece, data_dir):
    data = encode(read_glue("stsb", "train", data_dir), wordpiece, 128)
    assert data["label"].dtype == np.float32
    assert sorted(data["label"].tolist()) == pytest.approx([0.0, 3.8])
    assert data["input_ids"].shape == (2, 128)


def test_hidden_labels_are_refused(data_dir):
    for name in ("rte", "stsb"):
        message = f"glue/{name} in .*: the labels of test are hidden; .* validation"
        with pytest.raises(DataError, match=message):
            read_glue(name, "test", data_dir)


def test_an_unknown_task_lists_those_there_are():
    message = "task must be one of cola, sst2, mrpc, .* wnli, got 'sst3'"
    with pytest.raises(ConfigError, match=message):
        glue_task("sst3")


@pytest.mark.parametrize("split", ["dev", "validation[", "validation_matched"])
def test_an_unknown_split_lists_those_there_are(data_dir, split):
    message = (
        "split must be (one of train, validation, test, .*|a part of validation), got"
    )
    with pytest.raises(ConfigError, match=message):
        read_glue("rte", split, data_dir)


def test_missing_data_says_what_to_do(tmp_path, data_dir):
    with pytest.raises(DatasetMissing, match="tfds build glue/sst2 --data_dir"):
        read_glue("sst2", "train", tmp_path)
    with pytest.raises(DatasetMissing, match="glue/cola is not in"):
        read_glue("cola", "train", data_dir)


def test_a_row_needs_room_for_its_texts(wordpiece, data_dir):
    pairs = read_glue("rte", "train", data_dir)
    single = Texts([("a cat",)], np.zeros(1, np.int32))
    for texts, least in ((pairs, 5), (single, 3)):
        message = f"max_length must be at least {least}, got {least - 1}"
        with pytest.raises(ConfigError, match=message):
            encode(texts, wordpiece, least - 1)
    assert encode(pairs, wordpiece, 5)["attention_mask"].all()


@pytest.mark.parametrize(
    ("lengths", "room", "expected"),
    [
        ((9,), 4, (4,)),
        ((3,), 4, (3,)),
        ((2, 2), 4, (2, 2)),
        ((9, 1), 4, (3, 1)),
        ((1, 9), 4, (1, 3)),
        ((9, 3), 4, (2, 2)),
        ((9, 8), 5, (3, 2)),
        ((8, 9), 5, (2, 3)),
        ((8, 8), 5, (2, 3)),
        ((0, 9), 5, (0, 5)),
    ],
)
def test_the_longer_text_is_cut_first(lengths, room, expected):
    texts = tuple(np.arange(length) for length in lengths)
    found = truncate(texts, room)
    assert tuple(map(len, found)) == expected
    assert all(text.tolist() == list(range(len(text))) for text in found)


def test_the_table_is_complete():
    assert [len(task.columns) for task in TASKS.values()] == [1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert [name for name, task in TASKS.items() if task.is_regression] == ["stsb"]
    assert TASKS["mnli"].outputs == 3


def test_sst2_comes_through_the_loader(shared, wordpiece):
    where = shared / "datasets" / "tfds"
    data = encode(read_glue("sst2", "validation", where), wordpiece, 128)
    assert data["input_ids"].shape == (872, 128)
    assert data["label"].sum() == 444  # as many as GLUE's validation split has
    part = encode(read_glue("sst2", "train[:100]", where), wordpiece, 16)
    assert part["input_ids"].shape == (100, 16)
    assert (part["input_ids"][:, 0] == wordpiece.cls).all()
    assert part["attention_mask"].sum(axis=1).max() == 16
