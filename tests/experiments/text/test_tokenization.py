"""WordPiece: transformers' tokens and offsets, and every error."""

import json

import numpy as np
import pytest
import tokenizers

from experiments.errors import VocabularyError
from experiments.text.glue import truncate
from experiments.text.squad import make_windows, read_json
from experiments.text.tokenization import copy_vocabulary, load_wordpiece
from tests.data.language import record

WORDS = "[PAD] [UNK] [CLS] [SEP] a b ##b cafe ##s don ' t 中 国 the in 19 ##73 . - ##a"
ENTRIES = WORDS.split()
KEYS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture
def vocabulary(tmp_path):
    """Writes a vocab.txt and returns its path."""

    def write(entries=ENTRIES):
        file = tmp_path / "vocab.txt"
        file.write_text("\n".join(entries) + "\n", encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="module")
def recorded():
    return json.loads(record.FILE.read_text())


@pytest.fixture(scope="module")
def questions(shared):
    """Those of both files, as the recording program sees them."""
    files = [shared / "datasets" / name for name in record.SQUAD]
    return [question for file in files for question in read_json(file)]


@pytest.fixture(scope="module")
def pairs(questions):
    return [(question.question, question.context) for question in questions]


def tokens_of(wordpiece, text):
    (found,) = wordpiece([text])
    return found.ids.tolist(), found.offsets.tolist()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Don't", ["don/Don", "'/'", "t/t"]),
        # An accent that is a character of its own belongs to no token.
        ("CAFÉS cafe\u0301s", ["cafe/CAFÉ", "##s/S", "cafe/cafe", "##s/s"]),
        ("The 中国,", ["the/The", "中/中", "国/国", "[UNK]/,"]),
        ("in 1973-a.", ["in/in", "19/19", "##73/73", "-/-", "a/a", "./."]),
        ("a\u00a0b\u3000a\u2028b\ta", ["a/a", "b/b", "a/a", "b/b", "a/a"]),
        ("a\u200bb \u0000", ["a/a", "##b/b"]),  # characters without a width
        ("ab aB xb", ["a/a", "##b/b", "a/a", "##b/B", "[UNK]/xb"]),
        ("a" * 100, ["a/a"] + ["##a/a"] * 99),
        ("a" * 101, ["[UNK]/" + "a" * 101]),
        ("  \n", []),
        ("", []),
    ],
)
def test_pieces_and_their_places(vocabulary, text, pieces):
    ids, offsets = tokens_of(load_wordpiece(vocabulary()), text)
    found = [
        f"{ENTRIES[i]}/{text[begin:end]}"
        for i, (begin, end) in zip(ids, offsets, strict=True)
    ]
    assert found == pieces


def test_tricky_texts_are_divided_as_by_transformers(recorded, vocabulary):
    wordpiece = load_wordpiece(vocabulary(record.VOCABULARY), len(record.VOCABULARY))
    for text, expected in zip(record.TEXTS, recorded["texts"], strict=True):
        assert [*tokens_of(wordpiece, text)] == expected, text


def test_squad_contexts_are_divided_as_by_transformers(recorded, pairs, minilm):
    contexts = record.contexts(pairs)
    assert len(contexts) == len(recorded["contexts"]) == 500
    found = load_wordpiece(minilm, 30522)(contexts)
    for index, expected in recorded["in_full"].items():
        ids, offsets = expected
        assert found[int(index)].ids.tolist() == ids
        assert found[int(index)].offsets.tolist() == offsets
    assert [record.digest(*tokens) for tokens in found] == recorded["contexts"]


def test_vocabulary_and_json_agree(pairs, minilm):
    contexts = record.contexts(pairs)[:20]
    one, other = (
        load_wordpiece(minilm / name) for name in ("tokenizer.json", "vocab.txt")
    )
    for a, b in zip(one(contexts), other(contexts), strict=True):
        assert np.array_equal(a.ids, b.ids)
        assert np.array_equal(a.offsets, b.offsets)


@pytest.mark.parametrize("setting", [0, 1])
def test_windows_are_those_of_transformers(recorded, questions, minilm, setting):
    max_length, stride = record.WINDOWS[setting]
    windows = make_windows(
        questions[: record.WINDOW_QUESTIONS],
        load_wordpiece(minilm),
        max_length=max_length,
        stride=stride,
    )
    found = []
    for index in range(record.WINDOW_QUESTIONS):
        rows = windows.example == index
        arrays = [windows.features[key][rows] for key in KEYS]
        found.append(record.digest(*arrays, windows.offsets[rows]))
    assert found == recorded["windows"][setting]


@pytest.mark.parametrize("setting", [0, 1, 2])
def test_texts_are_cut_as_by_transformers(recorded, pairs, minilm, setting):
    wordpiece = load_wordpiece(minilm)
    length = record.PAIR_LENGTHS[setting]
    found = []
    for texts in record.pairs(pairs):
        ids = tuple(tokens.ids for tokens in wordpiece(texts))
        packed = wordpiece.pack([truncate(ids, length - 1 - len(ids))], length)
        found.append(record.digest(*(packed[key][0] for key in KEYS)))
    assert found == recorded["pairs"][setting]


def test_rows_have_separators_types_and_padding(vocabulary):
    wordpiece = load_wordpiece(vocabulary())
    packed = wordpiece.pack([([4, 5], [4]), ([5],), ([], [5])], 7)
    assert packed["input_ids"].tolist() == [
        [2, 4, 5, 3, 4, 3, 0],
        [2, 5, 3, 0, 0, 0, 0],
        [2, 3, 5, 3, 0, 0, 0],
    ]
    assert packed["token_type_ids"].tolist() == [
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
    ]
    assert packed["attention_mask"].sum(axis=1).tolist() == [6, 3, 4]
    assert {array.dtype for array in packed.values()} == {np.dtype(np.int32)}


def test_many_texts_come_back_in_order(vocabulary):
    found = load_wordpiece(vocabulary())(["a", "b", "the"] * 700)
    assert [tokens.ids.tolist() for tokens in found] == [[4], [5], [14]] * 700


def test_what_tokenizer_json_says_of_cutting_and_padding_is_left_aside(
    vocabulary, tmp_path
):
    tokenizer = load_wordpiece(vocabulary()).tokenizer
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokens_of(load_wordpiece(tmp_path), "a b a")[0] == [4, 5, 4]


def test_another_vocabulary_than_the_weights_is_refused(vocabulary):
    load_wordpiece(vocabulary(), len(ENTRIES))
    message = "vocab.txt has 21 entries, but the weights are for vocab_size=30522"
    with pytest.raises(VocabularyError, match=message):
        load_wordpiece(vocabulary(), 30522)


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(VocabularyError, match="vocab.txt is missing"):
        load_wordpiece(tmp_path / "vocab.txt")
    message = "holds none of tokenizer.json, vocab.txt"
    with pytest.raises(VocabularyError, match=message):
        load_wordpiece(tmp_path)


@pytest.mark.parametrize("name", ["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
def test_a_special_token_must_be_there(vocabulary, name):
    entries = [entry for entry in ENTRIES if entry != name]
    with pytest.raises(VocabularyError, match=f"lacks the special token \\{name}"):
        load_wordpiece(vocabulary(entries))


def test_an_entry_must_be_there_once(vocabulary):
    with pytest.raises(VocabularyError, match="has 'a' twice, in lines 5 and 22"):
        load_wordpiece(vocabulary([*ENTRIES, "a"]))


def test_a_vocabulary_must_be_text(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(VocabularyError, match="vocab.txt is not UTF-8"):
        load_wordpiece(tmp_path)


def test_another_tokenizer_json_is_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(VocabularyError, match="tokenizer.json cannot be read: EOF"):
        load_wordpiece(file)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(file))
    with pytest.raises(VocabularyError, match="must hold a WordPiece model, got BPE"):
        load_wordpiece(file)


@pytest.mark.parametrize("name", ["my_words.txt", "vocab.txt", "mine.json"])
def test_a_run_finds_its_copy_of_a_vocabulary_of_any_name(name, vocabulary, tmp_path):
    file = tmp_path / name
    wordpiece = load_wordpiece(vocabulary())
    if file.suffix == ".json":
        wordpiece.tokenizer.save(str(file))
    else:
        vocabulary().rename(file)
    copied, again = tmp_path / "run", tmp_path / "best"
    copy_vocabulary(file, copied)
    copy_vocabulary(copied, again)
    assert load_wordpiece(again, len(ENTRIES)).tokenizer.get_vocab() == (
        wordpiece.tokenizer.get_vocab()
    )


CASED = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "The",
    "river",
    "River",
    "is",
    "deep",
    "Deep",
    "A",
]


@pytest.mark.parametrize("lower", [False, True])
def test_case_is_kept_where_the_file_beside_says_so(lower, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(CASED))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"do_lower_case": lower}))
    (found,) = load_wordpiece(tmp_path)(["The River is Deep"])
    words = "the river is deep" if lower else "The River is Deep"
    assert [CASED[i] for i in found.ids] == words.split()


def test_a_cased_vocabulary_needs_to_say_whether_case_is_kept(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(CASED))
    with pytest.raises(VocabularyError, match="upper case, such as 'The'"):
        load_wordpiece(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    for text, message in (
        ("{", "cannot be"),
        ('{"do_lower_case": 1}', "true or false"),
    ):
        settings.write_text(text)
        with pytest.raises(VocabularyError, match=message):
            load_wordpiece(tmp_path)


@pytest.mark.parametrize("size", [13, 16, 32, 64])
def test_a_table_may_be_filled_up_to_a_round_number(size, tmp_path):
    text = "\n".join([f"[unused{i}]" for i in range(9)] + CASED[:4])
    (tmp_path / "vocab.txt").write_text("\ufeff" + text + "\n\n\n")
    assert len(load_wordpiece(tmp_path, size)) == 13
    with pytest.raises(VocabularyError, match="has 13 entries"):
        load_wordpiece(tmp_path, size + 1)
