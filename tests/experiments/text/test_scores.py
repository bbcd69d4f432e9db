"""SQuAD's and GLUE's scores, by hand."""

import numpy as np
import pytest

from experiments.text.glue import TASKS
from experiments.text.scores import answer_scores, label_scores, normalize


@pytest.mark.parametrize(
    ("prediction", "gold", "exact_match", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 100, 100),
        ("the Denver Broncos.", ["Denver  Broncos"], 100, 100),
        # Of two words found one is wanted, and that is all: 2 * 1/2 * 1 / (1/2 + 1).
        ("Denver Broncos", ["Broncos"], 0, 200 / 3),
        ("Broncos", ["Panthers", "Denver Broncos", "the broncos!"], 100, 100),
        # The best of each: no gold answer is both.
        ("a b c", ["b d", "b c x y"], 0, 200 * 2 / 6),
        # Punctuation goes without leaving a space, and before the articles.
        ("twenty-one", ["twentyone"], 100, 100),
        ("twenty-one", ["twenty one"], 0, 0),
        ("'a'", ["b"], 0, 0),
        ("The Who", ["Who"], 100, 100),
        ("theatre", ["atre"], 0, 0),  # an article is a whole word
        ("Café—bar", ["café bar"], 0, 0),  # only ASCII punctuation goes
        # Words count as often as they stand there: 1 of 3 and 1 of 2.
        ("b b b", ["b c"], 0, 100 * 2 / 5),
        ("", ["Denver"], 0, 0),
        ("", [""], 100, 0),  # as the official program has it
        ("the", ["a", "x"], 100, 0),  # nothing is left on either side
    ],
)
def test_answers_are_scored_as_by_the_official_program(
    prediction, gold, exact_match, f1
):
    found = answer_scores({"1": prediction}, {"1": gold})
    assert found == pytest.approx({"exact_match": exact_match, "f1": f1})


def test_scores_are_means_over_the_questions():
    gold = {"1": ["x"], "2": ["y z"], "3": ["w"], "4": ["v"]}
    predictions = {"1": "x", "2": "y", "3": "", "9": "v"}  # 4 is not answered
    expected = {"exact_match": 25, "f1": (100 + 200 / 3) / 4}
    assert answer_scores(predictions, gold) == pytest.approx(expected)


def test_an_answer_without_articles_punctuation_and_white_space():
    assert normalize("  An  apple, a day\tand THE rest! ") == "apple day and rest"
    assert normalize("$1,500.50") == "150050"
    assert normalize("the") == ""
    assert normalize("Either—or—the—other") == "either—or— —other"


LABELS = np.array([1, 0, 1, 1, 0, 0, 1, 0])
FOUND = np.array([1, 0, 0, 1, 1, 0, 1, 0])


def test_labels_are_scored_by_their_task():
    # Three true and one false positive, three true and one false negative.
    expected = {"accuracy": 75.0, "f1": 75.0, "matthews": 50.0}
    found = label_scores(("accuracy", "f1", "matthews"), FOUND, LABELS)
    assert found == pytest.approx(expected)


def test_numbers_are_scored_by_correlation():
    # Two neighbours are swapped: 1 - 6 * (1 + 1) / (5 * 24) by Spearman's formula. Away
    # from their means 6 and 3, squares and labels give 33 / sqrt(174 * 10).
    labels = np.array([1.0, 2.0, 3.0, 5.0, 4.0], np.float32)
    found = label_scores(("pearson", "spearman"), np.arange(5.0) ** 2, labels)
    expected = {"pearson": 100 * 33 / 1740**0.5, "spearman": 90.0}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("task", TASKS)
def test_a_collapsed_network_has_scores_too(task):
    scores = label_scores(TASKS[task].metrics, np.zeros(8), LABELS)
    expected = {"accuracy": 50.0}
    assert scores == {name: expected.get(name, 0.0) for name in TASKS[task].metrics}


def test_all_right_is_100():
    for task in TASKS.values():
        assert label_scores(task.metrics, LABELS, LABELS) == pytest.approx(
            dict.fromkeys(task.metrics, 100.0)
        )
