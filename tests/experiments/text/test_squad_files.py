"""SQuAD: what is read from its JSON and through tensorflow-datasets."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.errors import ConfigError, DataError, DatasetMissing
from experiments.text.squad import Answer, Question, read_json, read_tfds


def article(**changes):
    qa = {"id": "q", "question": "?", "answers": [{"text": "b", "answer_start": 2}]}
    return {"paragraphs": [{"context": "a b", "qas": [qa | changes]}]}


@pytest.fixture
def stored(tmp_path):
    def store(*articles):
        file = tmp_path / "squad.json"
        file.write_text(json.dumps({"version": "1.1", "data": list(articles)}))
        return file

    return store


def test_questions_are_read(stored):
    more = [{"text": "b", "answer_start": 2}, {"text": "a b", "answer_start": 0}]
    found = read_json(stored(article(), article(id="r", answers=more)))
    assert found == [
        Question("q", "?", "a b", (Answer("b", 2),)),
        Question("r", "?", "a b", (Answer("b", 2), Answer("a b", 0))),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": []}, "question 'q' has no answers; SQuAD v1.1 has some for each"),
        (
            {"answers": [{"text": "b", "answer_start": 1}]},
            "question 'q': its context of 3 characters must read 'b' at answer_start=1"
            ", but reads ' '",
        ),
        ({"answers": [{"text": "b", "answer_start": 3}]}, "=3, but reads ''"),
        ({"answers": [{"text": "a", "answer_start": -3}]}, "=-3, but reads 'a'"),
        (
            {"answers": [{"text": "", "answer_start": 0}]},
            "question 'q' has an empty answer, at answer_start=0",
        ),
        (
            {"answers": [{"text": "b"}]},
            r"squad.json: data\[0\].paragraphs\[0\].qas\[0\].answers\[0\]."
            "answer_start is missing",
        ),
        (
            {"answers": [{"text": "b", "answer_start": "2"}]},
            r"answers\[0\].answer_start must be of type int, got str",
        ),
        ({"answers": ["b"]}, r"answers\[0\] must be an object, got str"),
        ({"answers": None}, r"qas\[0\].answers must be of type list, got NoneType"),
        ({"question": 3}, r"qas\[0\].question must be of type str, got int"),
    ],
)
def test_a_malformed_question_is_named(stored, changes, message):
    with pytest.raises(DataError, match=message):
        read_json(stored(article(**changes)))


def test_an_id_may_be_there_once(stored):
    with pytest.raises(DataError, match="question 'q' appears twice"):
        read_json(stored(article(), article()))


def test_a_file_without_questions_is_refused(stored):
    for articles in ((), ({"paragraphs": []},)):
        with pytest.raises(DataError, match="squad.json holds no questions"):
            read_json(stored(*articles))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [', "squad.json is not JSON: Expecting value: line 1 column 11"),
        ("\xff", "squad.json is not JSON: 'utf-8' codec can't decode byte 0xff"),
        ("[]", "squad.json must be an object, got list"),
        ("{}", "squad.json: data is missing"),
        ('{"data": {}}', "squad.json: data must be of type list, got dict"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, message):
    file = tmp_path / "squad.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_json(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="squad.json is missing; it should be SQuAD"):
        read_json(tmp_path / "squad.json")
    with pytest.raises(DataError, match="cannot be read: .*directory"):
        read_json(tmp_path)


def test_the_same_comes_through_tensorflow_datasets(stored, store_rows, tmp_path):
    questions = read_json(stored(article(), article(id="r", question="a café?")))
    text = tfds.features.Text()
    answer = {"text": text, "answer_start": np.int32}
    names = ("id", "question", "context")
    rows = [
        {name: getattr(question, name) for name in names}
        | {
            "answers": {
                "text": [answer.text for answer in question.answers],
                "answer_start": [answer.start for answer in question.answers],
            }
        }
        for question in questions
    ]
    wrong = rows[0] | {"answers": {"text": ["b"], "answer_start": [0]}}
    store_rows(
        tmp_path,
        "squad",
        "v1.1",
        "3.0.0",
        dict.fromkeys(names, text) | {"answers": tfds.features.Sequence(answer)},
        {"train": rows, "validation": [wrong]},
    )
    assert sorted(read_tfds(tmp_path, "train")) == sorted(questions)
    message = "squad in .*: question 'q': its context .* at answer_start=0"
    with pytest.raises(DataError, match=message):
        read_tfds(tmp_path, "validation")
    with pytest.raises(ConfigError, match="split must be one of train, validation"):
        read_tfds(tmp_path, "dev")
    with pytest.raises(DatasetMissing, match="tfds build squad --data_dir"):
        read_tfds(tmp_path / "elsewhere", "train")
