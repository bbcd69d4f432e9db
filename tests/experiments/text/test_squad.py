"""SQuAD: windows, spans and answers."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from experiments.errors import ConfigError
from experiments.text.scores import answer_scores
from experiments.text.squad import (
    Answer,
    Question,
    answer_tokens,
    best_answers,
    make_windows,
    read_json,
    window_starts,
)
from experiments.text.tokenization import load_wordpiece
from tests.data.language.record import VOCABULARY

LETTERS = "abcdefghij"


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    """Every letter is a token, 5 to 14."""
    file = tmp_path_factory.mktemp("letters") / "vocab.txt"
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", *LETTERS]
    file.write_text("\n".join(entries))
    return load_wordpiece(file)


@pytest.fixture(scope="module")
def tricky(tmp_path_factory):
    """A vocabulary whose tokens share and skip characters."""
    file = tmp_path_factory.mktemp("tricky") / "vocab.txt"
    file.write_text("\n".join(VOCABULARY), encoding="utf-8")
    return load_wordpiece(file)


def ask(context, text, start=None, question="?", key="1"):
    start = context.index(text) if start is None else start
    return Question(key, question, context, (Answer(text, start),))


def gold_logits(windows):
    """What a network says that knows where the answers are."""
    shape = windows.offsets.shape[:2]
    rows = np.arange(shape[0])
    logits = []
    for name in ("start", "end"):
        logits.append(np.zeros(shape, np.float32))
        logits[-1][rows, windows.features[name]] = 1
    return logits


SPACED = " ".join(LETTERS)  # ten tokens, token i at character 2 * i


def test_a_context_in_windows_by_hand(wordpiece):
    # Eight tokens a row, of which "[CLS] ? [SEP]" and the last [SEP] leave four for the
    # context; each part shares two tokens with the next.
    windows = make_windows(
        [ask(SPACED, "e f")], wordpiece, max_length=8, stride=2, question_limit=1
    )
    assert windows.features["input_ids"].tolist() == [
        [2, 4, 3, 5, 6, 7, 8, 3],
        [2, 4, 3, 7, 8, 9, 10, 3],
        [2, 4, 3, 9, 10, 11, 12, 3],
        [2, 4, 3, 11, 12, 13, 14, 3],
    ]
    assert windows.features["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]] * 4
    assert windows.features["attention_mask"].all()
    # "e f" are tokens 9 and 10.
    assert windows.features["start"].tolist() == [0, 5, 3, 0]
    assert windows.features["end"].tolist() == [0, 6, 4, 0]
    assert windows.example.tolist() == [0, 0, 0, 0]
    assert windows.offsets[1].tolist() == [
        *[[-1, -1]] * 3,
        *[[4, 5], [6, 7], [8, 9], [10, 11]],
        [-1, -1],
    ]


def test_half_an_answer_is_none(wordpiece):
    windows = make_windows(
        [ask(SPACED, "d e")], wordpiece, max_length=8, stride=0, question_limit=1
    )
    # a b c d | e f g h | i j
    assert windows.features["start"].tolist() == [0, 0, 0]
    assert windows.features["end"].tolist() == [0, 0, 0]
    last = windows.features["attention_mask"][2].tolist()
    assert last == [1, 1, 1, 1, 1, 1, 0, 0]


def test_a_long_question_is_cut(wordpiece):
    question = ask(SPACED, "a", question="j i h g f")
    windows = make_windows(
        [question], wordpiece, max_length=9, stride=1, question_limit=2
    )
    assert windows.features["input_ids"][:, :4].tolist() == [[2, 14, 13, 3]] * 3


def test_questions_keep_their_order(wordpiece):
    questions = [
        ask(SPACED, "a", key="1"),
        ask("b c", "c", key="2", question="j?"),
        ask(SPACED, "j", key="3"),
    ]
    options = {"max_length": 9, "stride": 1, "question_limit": 3}
    windows = make_windows(questions, wordpiece, **options)
    assert windows.example.tolist() == [0, 0, 0, 1, 2, 2, 2]
    found = best_answers(questions, windows, *gold_logits(windows))
    assert found == {"1": "a", "2": "c", "3": "j"}


@given(st.integers(0, 40), st.integers(1, 12), st.data())
def test_windows_cover_a_context_and_no_more(tokens, capacity, data):
    stride = data.draw(st.integers(0, capacity - 1))
    parts = [
        set(range(begin, min(begin + capacity, tokens)))
        for begin in window_starts(tokens, capacity, stride)
    ]
    assert set.union(*parts) == set(range(tokens))
    for part, following in itertools.pairwise(parts):
        assert len(part & following) == stride  # the last part may be shorter
        assert following - part


CHARACTERS = st.one_of(
    st.sampled_from("abcnisoß中国가각²…! .'-$19\u0301\u00a0\u200d\n😀"),
    st.characters(codec="utf-8"),
)


@given(st.text(CHARACTERS, min_size=1, max_size=40), st.data())
def test_spans_of_tokens_come_back_exactly(tricky, context, data):
    (tokens,) = tricky([context])
    begins, ends = tokens.offsets.T
    # What searching in them relies on.
    assert (np.diff(begins) >= 0).all()
    assert (np.diff(ends) >= 0).all()
    assert (begins < ends).all()
    assert (ends <= len(context)).all()
    if not len(begins):
        return
    first = data.draw(st.integers(0, len(begins) - 1))
    last = data.draw(st.integers(first, len(begins) - 1))
    text = context[begins[first] : ends[last]]
    question = ask(context, text, int(begins[first]), question="cat?")
    i, j = answer_tokens(tokens, question.answers[0])
    assert context[begins[i] : ends[j]] == text

    length = data.draw(st.integers(9, 60))
    stride = data.draw(st.integers(0, length - 9))
    windows = make_windows(
        [question], tricky, max_length=length, stride=stride, question_limit=5
    )
    inside = windows.offsets[..., 0] >= 0
    ids = windows.features["input_ids"]
    covered = set(zip(ids[inside], *windows.offsets[inside].T, strict=True))
    assert covered == set(zip(tokens.ids, begins, ends, strict=True))
    holding = np.flatnonzero(windows.features["start"])
    for row in holding:
        start, end = (windows.features[name][row] for name in ("start", "end"))
        offsets = windows.offsets[row]
        assert context[offsets[start, 0] : offsets[end, 1]] == text
    # What two windows share, and one token of either.
    assert len(holding) or j - i + 1 > stride + 1


def test_an_answer_within_a_word_gets_the_word(wordpiece, tricky):
    question = ask("cats cat", "at", 1)
    (tokens,) = tricky([question.context])
    assert answer_tokens(tokens, question.answers[0]) == (0, 0)
    windows = make_windows([question], tricky)
    assert best_answers([question], windows, *gold_logits(windows)) == {"1": "cat"}


def test_white_space_around_an_answer_is_left_off(wordpiece):
    question = ask("a  b c", "  b ", 1)
    windows = make_windows([question], wordpiece)
    assert best_answers([question], windows, *gold_logits(windows)) == {"1": "b"}


def test_an_answer_without_tokens_points_at_the_first(wordpiece):
    windows = make_windows([ask("a \u200b b", "\u200b")], wordpiece)
    assert windows.features["start"].tolist() == [0]


@pytest.fixture
def one(wordpiece):
    """A question in one window, of which token i of the context is row entry 3 + i."""
    questions = [ask(SPACED, "a")]
    windows = make_windows(
        questions, wordpiece, max_length=20, stride=2, question_limit=1
    )

    def answer(starts, ends, **options):
        logits = [np.zeros((1, 20), np.float32) for _ in range(2)]
        for array, given_logits in zip(logits, (starts, ends), strict=True):
            for token, logit in given_logits.items():
                array[0, 3 + token] = logit
        return best_answers(questions, windows, *logits, **options)["1"]

    return answer


def test_the_best_span_wins(one):
    assert one({2: 3, 4: 2}, {3: 1, 5: 4}) == "c d e f"
    # The likeliest end lies before the likeliest start.
    assert one({5: 3, 0: 1}, {3: 3, 9: 0.5}) == "a b c d"
    assert one({5: 3, 0: 1}, {3: 3, 9: 1.5}) == "f g h i j"
    assert one({3: 2}, {2: 2, 3: 1}) == "d"


def test_long_spans_are_left_aside(one):
    logits = {0: 5, 6: 2}, {9: 5, 7: 1}
    assert one(*logits) == SPACED
    assert one(*logits, max_answer_length=10) == SPACED
    assert one(*logits, max_answer_length=9) == "g h i j"


def test_only_the_likeliest_ends_are_tried(one):
    logits = {5: 3, 0: 1}, {3: 3, 9: 0.5}
    assert one(*logits, n_best=1) == ""
    assert one(*logits, n_best=2) == "a b c d"


def test_tokens_outside_the_context_are_no_answer(one):
    # [CLS], the question, both separators and padding.
    outside = dict.fromkeys((-3, -2, -1, 10, 11, 16), 9)
    assert one(outside | {1: 1}, outside | {2: 1}) == "b c"


def test_equal_scores_go_to_the_first(one):
    assert one({}, {}) == "a"
    assert one({4: 1, 2: 1}, {6: 1, 8: 1}) == "c d e f g"


def test_the_best_window_wins(wordpiece):
    questions = [ask(SPACED, "a")]
    windows = make_windows(
        questions, wordpiece, max_length=8, stride=2, question_limit=1
    )
    starts, ends = (np.zeros((4, 8), np.float32) for _ in range(2))
    starts[[0, 1, 3], [3, 4, 5]] = 1, 2, 1.5
    ends[[0, 1, 3], [4, 5, 6]] = 1, 2, 1.5
    assert best_answers(questions, windows, starts, ends) == {"1": "d e"}
    assert best_answers(questions, windows, starts * 0, ends * 0) == {"1": "a"}


def test_what_best_answers_refuses(one, wordpiece):
    questions = [ask(SPACED, "a")]
    windows = make_windows(questions, wordpiece)
    logits = np.zeros((1, 384))
    message = r"must have shape \(1, 384\), got \(1, 384\) and \(1, 383\)"
    with pytest.raises(ConfigError, match=message):
        best_answers(questions, windows, logits, logits[:, 1:])
    for name in ("n_best", "max_answer_length"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
            one({}, {}, **{name: 0})


@pytest.mark.parametrize("stride", [-1, 3, 4])
def test_windows_must_move_on(wordpiece, stride):
    message = (
        "stride must be at least 0 and below 3, what max_length=10 leaves beside "
        f"question_limit=4, got {stride}"
    )
    with pytest.raises(ConfigError, match=message):
        make_windows(
            [ask(SPACED, "a")],
            wordpiece,
            max_length=10,
            stride=stride,
            question_limit=4,
        )


@pytest.mark.parametrize("limit", [-1, 0, 7])
def test_a_question_leaves_room(wordpiece, limit):
    message = f"question_limit must be from 1 to 6, so that .*=10 leaves .*got {limit}"
    with pytest.raises(ConfigError, match=message):
        make_windows(
            [ask("a", "a")], wordpiece, max_length=10, stride=0, question_limit=limit
        )


def test_gold_answers_come_back_through_the_whole_chain(shared, minilm):
    questions = read_json(
        shared / "datasets" / "squad" / "squad-dev-articles-eval.json"
    )
    assert len(questions) == 1534
    wordpiece = load_wordpiece(minilm, 30522)
    windows = make_windows(questions, wordpiece)
    logits = gold_logits(windows)
    found = best_answers(questions, windows, *logits, max_answer_length=384)
    representable, whole = [], {}
    for question in questions:
        (tokens,) = wordpiece([question.context])
        first, last = answer_tokens(tokens, question.answers[0])
        span = slice(tokens.offsets[first, 0], tokens.offsets[last, 1])
        whole[question.id] = question.context[span]
        if whole[question.id] == question.answers[0].text:
            representable.append(question)
    # The others end within a word, such as "Israel" in "Israelis".
    assert len(representable) == 1525
    assert found == whole
    gold = {q.id: [answer.text for answer in q.answers] for q in representable}
    assert answer_scores(found, gold) == {"exact_match": 100, "f1": 100}
    # Seven answers have more than the usual 30 tokens.
    usual = best_answers(questions, windows, *logits)
    assert sum(usual[key] != text for key, text in whole.items()) == 7
