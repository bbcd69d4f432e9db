"""Labelled texts of your own: what is read, and what is refused."""

import dataclasses
import json

import pytest

from experiments.errors import ConfigError, DataError, VocabularyError
from experiments.text.config import TextConfig, TextDataConfig
from experiments.text.data import held_out
from experiments.text.files import read_labelled
from experiments.text.kind import (
    export,
    keep_sources,
    kept_sources,
    load_text,
    resolve,
)
from experiments.text.squad import read_json

ROWS = [("good", "pos"), ('a "quoted", one\nof two lines', "neg"), ("fine", "pos")]


def write(path, rows=ROWS):
    if path.suffix == ".csv":
        quoted = [
            ",".join('"' + value.replace('"', '""') + '"' for value in row)
            for row in [("text", "label"), *rows]
        ]
        path.write_text("\ufeff" + "\r\n".join(quoted) + "\r\n", newline="")
    else:
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        path.write_text("\n".join([*lines, "", ""]))
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_both_formats_hold_the_same_rows(name, tmp_path):
    found = read_labelled(write(tmp_path / name), ["text"], "label")
    assert [(row.texts[0], row.label) for row in found] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "must end in .csv or .jsonl"),
        ("a.csv", None, "a.csv is missing"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.csv", "text,class\na,b\n", "line 2 lacks 'label'; it has text, class"),
        ("a.csv", "text,label\nonly\n", "line 2 lacks 'label'"),
        ("a.csv", 'text,label\n"open,b\n', "is not CSV"),
        ("a.csv", "text,label,label\na,b,c\n", "has the column 'label' twice"),
        (
            "a.csv",
            "text,label\na,b\na, b,c\n",
            "line 3 has more fields than the header",
        ),
        ("a.csv", 'text,label\n\n"a\n\nb",b\n\na\n', "line 7 lacks 'label'"),
        ("a.jsonl", '{"text": "\\ud83d", "label": 1}', "line 1: not valid Unicode"),
        ("a.jsonl", '{"text": "a"', "line 1 is not JSON"),
        ("a.jsonl", "[1]", "line 1 must be an object"),
        ("a.jsonl", '{"text": 3, "label": 1}', "texts must be text"),
        ("a.jsonl", '{"text": "a", "label": 1.5}', "label must be a class"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_what_a_file_lacks_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_labelled(path, ["text"], "label")


def test_a_text_may_be_long(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{'a' * 200_000},b\n")
    (row,) = read_labelled(path, ["text"], "label")
    assert len(row.texts[0]) == 200_000


@pytest.fixture
def own(text_config, tmp_path):
    return TextConfig(
        name="own",
        data=TextDataConfig(name="file", max_length=12, batch_size=2),
        model=text_config.model,
        vocabulary=text_config.vocabulary,
        train_file=str(write(tmp_path / "train.csv")),
        eval_file=str(write(tmp_path / "eval.jsonl")),
    )


def test_labels_are_those_of_the_training_file(own, tmp_path):
    config = resolve(own)
    assert config.data.labels == ("neg", "pos")
    data = load_text(config)
    assert data.train.arrays["label"].tolist() == [1, 0, 1]
    write(tmp_path / "eval.jsonl", [("what", "neutral")])
    with pytest.raises(DataError, match="line 1 has the label 'neutral', expected one"):
        load_text(config)
    with pytest.raises(ConfigError, match="name a CSV or JSONL file with --eval-file"):
        resolve(dataclasses.replace(own, eval_file=None))


@pytest.mark.parametrize("labels", [("pos",), ("pos", "pos")])
def test_labels_are_at_least_two(labels):
    with pytest.raises(ConfigError, match="labels must be at least two, each once"):
        TextDataConfig(name="file", labels=labels)


def test_spaces_around_a_label_do_not_count(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na, pos\nb,pos\n")
    rows = read_labelled(path, ["text"], "label")
    assert [row.label for row in rows] == ["pos", "pos"]


def test_a_run_keeps_its_vocabulary_and_exports_no_other_file(own, tmp_path):
    run, out, secret = tmp_path / "run", tmp_path / "out", tmp_path / "secret"
    secret.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\npassword\n")
    foreign = dataclasses.replace(own, vocabulary=str(secret))
    with pytest.raises(VocabularyError, match="lacks its vocabulary"):
        kept_sources(foreign, run)
    with pytest.raises(VocabularyError, match="vocabulary is missing"):
        export(foreign, (None, None), run, out, None)
    assert not out.exists()
    keep_sources(own, run)
    assert kept_sources(foreign, run).vocabulary == str(run / "vocabulary")
    assert (run / "vocabulary" / "vocab.txt").exists()


def test_a_bert_of_one_segment_refuses_two_texts_in_a_row(text_config):
    model = dataclasses.replace(text_config.model, type_vocab_size=1)
    with pytest.raises(ConfigError, match=r"type_vocab_size=1 is too small for squad"):
        load_text(dataclasses.replace(text_config, model=model))


def numbered(count):
    return [(f"text {i}", ("neg", "pos")[i % 2]) for i in range(count)]


def test_texts_are_held_out_of_one_file(own, tmp_path):
    rows = [*numbered(30), *numbered(30)]  # each twice
    file = write(tmp_path / "train.csv", rows)
    data = dataclasses.replace(own.data, validation=7, labels=("neg", "pos"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "text", *map(str, range(123))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = dataclasses.replace(
        own, data=data, train_file=str(file), eval_file=None, vocabulary=str(tmp_path)
    )
    config.check_inputs()
    loaded = load_text(config)
    sides = [
        {tuple(ids) for ids in part.arrays["input_ids"].tolist()}
        for part in (loaded.train, loaded.evaluation)
    ]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [
        26,
        4,
    ]  # 8 rows, because each is there twice
    assert (loaded.train.size, loaded.evaluation.size) == (52, 8)


def test_rows_that_are_added_never_become_held_out_from_trained():
    texts = [row[:1] for row in numbered(200)]
    before = held_out(texts[:100], 20)
    after = held_out(texts, 20)
    assert before.sum() == after.sum() == 20
    assert not (after[:100] & ~before).any()
    assert after[100:].any()
    assert not held_out(texts, 0).any()
    with pytest.raises(ConfigError, match="validation=200 leaves none of the 200"):
        held_out(texts, 200)


def test_questions_are_held_out_by_context(text_config, tmp_path):
    config = dataclasses.replace(
        text_config, data=dataclasses.replace(text_config.data, validation=1)
    )
    loaded = load_text(config)
    trained = set(map(tuple, loaded.train.arrays["input_ids"].tolist()))
    judged = loaded.evaluation.questions
    everything = read_json(config.train_file)
    contexts = {question.context for question in judged}
    assert len(contexts) == 1
    assert list(judged) == [q for q in everything if q.context in contexts]
    rows = map(tuple, loaded.evaluation.windows.features["input_ids"].tolist())
    assert not trained & set(rows)
