"""WordPiece: the tokens of BERT, and where in the text each comes from."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from cram_jax.writing import replacing
from experiments.errors import VocabularyError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
FILES = ("tokenizer.json", "vocab.txt")
SETTINGS = "tokenizer_config.json"
CHUNK = 1024  # texts; the library's record of a text is many times larger than ours


class Tokens(NamedTuple):
    """The tokens of a text, without special ones.

    Attributes:
      ids: int32, (tokens,).
      offsets: int32, (tokens, 2): token i stands for the characters
        ``text[offsets[i, 0]:offsets[i, 1]]``.
    """

    ids: np.ndarray
    offsets: np.ndarray


class WordPiece:
    """A vocabulary, and the rules by which it tokenizes text.

    Args:
      tokenizer: of the tokenizers library; its truncation and padding are turned off.
      file: where it was read from, for messages.

    Raises:
      VocabularyError: the vocabulary lacks a special token.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, file: Path):
        missing = [name for name in SPECIAL if tokenizer.token_to_id(name) is None]
        if missing:
            raise VocabularyError(f"{file} lacks the special token {missing[0]}")
        self.pad, _, self.cls, self.sep = map(tokenizer.token_to_id, SPECIAL)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """Divides texts, in parallel."""
        found = []
        for begin in range(0, len(texts), CHUNK):
            chunk = list(texts[begin : begin + CHUNK])
            for row in self.tokenizer.encode_batch(chunk, add_special_tokens=False):
                offsets = np.array(row.offsets, np.int32).reshape(-1, 2)
                found.append(Tokens(np.array(row.ids, np.int32), offsets))
        return found

    def pack(
        self, sequences: Sequence[tuple[np.ndarray, ...]], length: int
    ) -> dict[str, np.ndarray]:
        """Puts one or two texts per row between special tokens, and pads the rest.

        A row is ``[CLS] first [SEP]``, or ``[CLS] first [SEP] second [SEP]``.

        Args:
          sequences: for each row the ids of its texts, short enough.
          length: of the rows.

        Returns:
          ``input_ids``, ``attention_mask`` (0 for padding) and ``token_type_ids`` (1
          for the second text and its separator), int32, (sequences, length) each.
        """
        shape = (len(sequences), length)
        ids = np.full(shape, self.pad, np.int32)
        mask, types = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, texts in enumerate(sequences):
            parts: list[Any] = [[self.cls]]
            for text in texts:
                parts += [text, [self.sep]]
            joined: np.ndarray = np.concatenate(parts)
            ids[row, : len(joined)] = joined
            mask[row, : len(joined)] = 1
            types[row, len(texts[0]) + 2 : len(joined)] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def load_wordpiece(path: str | Path, vocab_size: int | None = None) -> WordPiece:
    """Reads a vocabulary.

    ``tokenizer.json`` says itself how text is normalised. For ``vocab.txt``, with one
    entry per line, ``tokenizer_config.json`` next to it may: ``do_lower_case``,
    ``strip_accents`` and ``tokenize_chinese_chars``. The default is that of the uncased
    BERT: lower case, no accents, no control characters, every Chinese character a word.

    Args:
      path: one of the two files, or a directory that holds one.
      vocab_size: of the BertConfig of the weights. It may be larger by padding to a
        multiple of 8, 16, 32 or 64.

    Returns:
      The tokenizer; special tokens in a text are recognised as such.

    Raises:
      VocabularyError: there is no such file, it is malformed, or it does not have
        ``vocab_size`` entries.
    """
    path = vocabulary_files(path)[0]
    read = _read_json if path.suffix == ".json" else _read_vocabulary
    wordpiece = WordPiece(read(path), path)
    fitting = {-(-len(wordpiece) // m) * m for m in (1, 8, 16, 32, 64)}
    if vocab_size is not None and vocab_size not in fitting:
        raise VocabularyError(
            f"{path} has {len(wordpiece)} entries, but the weights are for "
            f"vocab_size={vocab_size}: take the vocabulary that came with them"
        )
    return wordpiece


def vocabulary_files(path: str | Path) -> list[Path]:
    """The files of a vocabulary, the one to read first.

    Args:
      path: one of them, or a directory that holds some.

    Raises:
      VocabularyError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        there = [path / name for name in FILES if (path / name).is_file()]
        if not there:
            raise VocabularyError(f"{path} holds none of {', '.join(FILES)}")
        return there
    if not path.is_file():
        raise VocabularyError(f"{path} is missing; it is the vocabulary of the weights")
    return [path]


def copy_vocabulary(path: str | Path, folder: Path) -> None:
    """Copies a vocabulary, with the files that say how its text is normalised.

    A file of any other name gets the usual one, by which it is found there.

    Raises:
      OSError: it cannot be written.
      VocabularyError: there is none.
    """
    files = vocabulary_files(path)
    files += [f for f in (files[0].with_name(SETTINGS),) if f.is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        usual = FILES[0] if file.suffix == ".json" else FILES[1]
        copy = folder / (file.name if file.name == SETTINGS else usual)
        if file.resolve() != copy.resolve():
            with replacing(copy) as beside:
                shutil.copyfile(file, beside)


def _read_json(file: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise VocabularyError(f"{file} cannot be read: {error}") from error
    if not isinstance(tokenizer.model, tokenizers.models.WordPiece):
        kind = type(tokenizer.model).__name__
        raise VocabularyError(f"{file} must hold a WordPiece model, got {kind}")
    return tokenizer


def _read_vocabulary(file: Path) -> tokenizers.Tokenizer:
    try:
        # A byte order mark and blank lines at the end are an editor's, not entries.
        lines = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except OSError as error:
        raise VocabularyError(f"{file} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{file} is not UTF-8: {error}") from error
    entries: dict[str, int] = {}
    for index, entry in enumerate(lines):
        if entries.setdefault(entry, index) != index:
            raise VocabularyError(
                f"{file} has {entry!r} twice, in lines {entries[entry] + 1} and "
                f"{index + 1}"
            )
    model = tokenizers.models.WordPiece(entries, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = _normalizer(file, entries)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(
        [name for name in (*SPECIAL, "[MASK]") if name in entries]
    )
    return tokenizer


def _normalizer(
    file: Path, entries: dict[str, int]
) -> tokenizers.normalizers.BertNormalizer:
    """How text is normalised, by the settings file next to ``vocab.txt``."""
    settings: dict[str, bool | None] = {
        "do_lower_case": None,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
    }
    beside = file.with_name(SETTINGS)
    if beside.is_file():
        try:
            stored = json.loads(beside.read_text(encoding="utf-8-sig"))
            settings |= {name: stored[name] for name in settings if name in stored}
        except (OSError, ValueError, TypeError) as error:
            raise VocabularyError(f"{beside} cannot be read: {error}") from error
        for name, value in settings.items():
            if not isinstance(value, bool | None):
                raise VocabularyError(f"{beside}: {name} must be true or false")
    lower = settings["do_lower_case"]
    cased = [entry for entry in entries if entry != entry.lower() and entry[0] != "["]
    if lower is None and cased:
        raise VocabularyError(
            f"{file} has entries in upper case, such as {cased[0]!r}: say in "
            f"{SETTINGS} beside it whether text is put in lower case, "
            '{"do_lower_case": false} for a cased model'
        )
    return tokenizers.normalizers.BertNormalizer(
        lowercase=lower is not False,
        strip_accents=settings["strip_accents"],
        handle_chinese_chars=bool(settings["tokenize_chinese_chars"]),
    )
