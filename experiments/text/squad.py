"""SQuAD v1.1: questions, the windows that a network reads, and its answers.

Reference: Rajpurkar et al., SQuAD, EMNLP 2016, arXiv 1606.05250.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.datasets import examples, open_dataset
from experiments.errors import ConfigError, DataError
from experiments.text.files import check_text
from experiments.text.tokenization import Tokens, WordPiece


class Answer(NamedTuple):
    """A gold answer: ``text`` starts at character ``start`` of the context."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a context, with at least one gold answer."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]


class Windows(NamedTuple):
    """Questions with the parts of their contexts, each as long as a network reads.

    Attributes:
      features: int32; ``input_ids``, ``attention_mask`` and ``token_type_ids``,
        (windows, length), and ``start`` and ``end``, (windows,): the first and last
        token of the first gold answer, both 0, which is [CLS], where the window does
        not hold all of it.
      example: int32, (windows,), ascending: which question.
      offsets: int32, (windows, length, 2): the characters of the context that a token
        stands for, as in Tokens; -1 for tokens outside the context.
    """

    features: dict[str, np.ndarray]
    example: np.ndarray
    offsets: np.ndarray


def read_json(file: str | Path) -> list[Question]:
    """Reads the official JSON.

    Raises:
      DataError: the file is missing or malformed, or an answer is not where the file
        says; the message names the place.
    """
    file = Path(file)
    try:
        node = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; it should be SQuAD v1.1 JSON") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    questions = []
    for article, in_article in _each(node, "data", f"{file}: "):
        for paragraph, in_paragraph in _each(article, "paragraphs", in_article):
            context = _get(paragraph, "context", str, in_paragraph)
            for qa, in_qa in _each(paragraph, "qas", in_paragraph):
                answers = [
                    Answer(_get(a, "text", str, at), _get(a, "answer_start", int, at))
                    for a, at in _each(qa, "answers", in_qa)
                ]
                name, text = (_get(qa, key, str, in_qa) for key in ("id", "question"))
                questions.append(Question(name, text, context, tuple(answers)))
    return _checked(questions, str(file))


def read_tfds(data_dir: Path, split: str) -> list[Question]:
    """Reads tensorflow-datasets' ``squad``.

    Args:
      data_dir: where tensorflow-datasets keeps it.
      split: "train" or "validation", or a part such as ``train[:1000]``.

    Raises:
      ConfigError: there is no such split.
      DatasetMissing: the data set is not there.
      DataError: an answer is not where the data set says.
    """
    questions = []
    for row in examples(open_dataset("squad", data_dir), split):
        answers = zip(
            row["answers"]["text"], row["answers"]["answer_start"], strict=True
        )
        questions.append(
            Question(
                row["id"].decode(),
                row["question"].decode(),
                row["context"].decode(),
                tuple(Answer(text.decode(), int(start)) for text, start in answers),
            )
        )
    return _checked(questions, f"squad in {data_dir}")


def make_windows(
    questions: Sequence[Question],
    wordpiece: WordPiece,
    *,
    max_length: int = 384,
    stride: int = 128,
    question_limit: int = 64,
) -> Windows:
    """Divides contexts so that each part fits into a row with its question.

    A row is ``[CLS] question [SEP] part of the context [SEP]`` and padding.

    Args:
      questions: at least one.
      wordpiece: the vocabulary.
      max_length: tokens in a row.
      stride: tokens that a part shares with the next.
      question_limit: tokens kept of a question.

    Returns:
      The windows, in the order of the questions. An answer without a visible character
      has no token; its windows point at [CLS].

    Raises:
      ConfigError: a question or the stride leaves no room for the context to advance.
    """
    room = max_length - question_limit - 3
    if question_limit < 1 or room < 1:
        raise ConfigError(
            f"question_limit must be from 1 to {max_length - 4}, so that "
            f"max_length={max_length} leaves room for a context, got {question_limit}"
        )
    if not 0 <= stride < room:
        raise ConfigError(
            f"stride must be at least 0 and below {room}, what max_length={max_length} "
            f"leaves beside question_limit={question_limit}, got {stride}"
        )
    contexts = list(dict.fromkeys(question.context for question in questions))
    tokens_of = dict(zip(contexts, wordpiece(contexts), strict=True))
    asked = wordpiece([question.question for question in questions])
    rows, parts, spans, example = [], [], [], []
    for index, (question, words) in enumerate(zip(questions, asked, strict=True)):
        ids = words.ids[:question_limit]
        tokens = tokens_of[question.context]
        first, last = answer_tokens(tokens, question.answers[0])
        capacity = max_length - len(ids) - 3
        for begin in window_starts(len(tokens.ids), capacity, stride):
            holds = begin <= first <= last < begin + capacity
            shift = len(ids) + 2 - begin
            rows.append((ids, tokens.ids[begin : begin + capacity]))
            parts.append(tokens.offsets[begin : begin + capacity])
            spans.append((first + shift, last + shift) if holds else (0, 0))
            example.append(index)
    offsets = np.full((len(rows), max_length, 2), -1, np.int32)
    for row, (ids, _), part in zip(offsets, rows, parts, strict=True):
        row[len(ids) + 2 : len(ids) + 2 + len(part)] = part
    start, end = np.array(spans, np.int32).reshape(-1, 2).T
    features = wordpiece.pack(rows, max_length) | {"start": start, "end": end}
    return Windows(features, np.array(example, np.int32), offsets)


def window_starts(tokens: int, capacity: int, stride: int) -> range:
    """Where the windows over a context begin; the last one reaches its end."""
    return range(0, max(tokens - stride, 1), capacity - stride)


def answer_tokens(tokens: Tokens, answer: Answer) -> tuple[int, int]:
    """The first and last token with a character of the answer, else first > last."""
    begins, ends = tokens.offsets.T
    first = np.searchsorted(ends, answer.start, side="right")
    last = np.searchsorted(begins, answer.start + len(answer.text), side="left") - 1
    return int(first), int(last)


def best_answers(
    questions: Sequence[Question],
    windows: Windows,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
) -> dict[str, str]:
    """The likeliest answer to each question over all of its windows.

    A span's score is the sum of its first token's start logit and its last token's end
    logit. Equal scores: the earlier window, then the likelier start.

    Args:
      questions: those of the windows.
      windows: what the network read.
      start_logits: (windows, length).
      end_logits: (windows, length).
      n_best: starts and ends considered in a window, the likeliest in its context.
      max_answer_length: tokens in the longest answer.

    Returns:
      For each question's id, a part of its context, verbatim; empty if no start has an
      end at or after it that is near enough.

    Raises:
      ConfigError: a limit is below 1, or the logits are not those of the windows.
    """
    for name, limit in (("n_best", n_best), ("max_answer_length", max_answer_length)):
        if limit < 1:
            raise ConfigError(f"{name} must be at least 1, got {limit}")
    shape = windows.offsets.shape[:2]
    if start_logits.shape != shape or end_logits.shape != shape:
        raise ConfigError(
            f"start_logits and end_logits must have shape {shape}, got "
            f"{start_logits.shape} and {end_logits.shape}"
        )
    answers = {question.id: "" for question in questions}
    scores = dict.fromkeys(answers, -np.inf)
    for row, example in enumerate(windows.example):
        offsets, question = windows.offsets[row], questions[example]
        inside = np.flatnonzero(offsets[:, 0] >= 0)
        starts, start_scores = _likeliest(start_logits[row], inside, n_best)
        ends, end_scores = _likeliest(end_logits[row], inside, n_best)
        length = ends - starts[:, None] + 1
        allowed = (length >= 1) & (length <= max_answer_length)
        if not allowed.any():
            continue
        total = np.where(allowed, start_scores[:, None] + end_scores, -np.inf)
        i, j = np.unravel_index(total.argmax(), total.shape)
        if total[i, j] > scores[question.id]:
            scores[question.id] = total[i, j]
            answers[question.id] = question.context[
                offsets[starts[i], 0] : offsets[ends[j], 1]
            ]
    return answers


def _likeliest(
    logits: np.ndarray, inside: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a window's context and their logits, in falling order."""
    logits = np.asarray(logits[inside], np.float32)
    order = np.argsort(-logits, kind="stable")[:count]
    return inside[order], logits[order]


def _checked(questions: list[Question], source: str) -> list[Question]:
    if not questions:
        raise DataError(f"{source} holds no questions")
    seen = set()
    for question in questions:
        where = f"{source}: question {question.id!r}"
        check_text(where, question.question, question.context)
        if question.id in seen:
            raise DataError(f"{where} appears twice")
        seen.add(question.id)
        if not question.answers:
            raise DataError(f"{where} has no answers; SQuAD v1.1 has some for each")
        for text, start in question.answers:
            if not text:
                raise DataError(f"{where} has an empty answer, at answer_start={start}")
            there = question.context[max(start, 0) : max(start, 0) + len(text)]
            if start < 0 or there != text:
                raise DataError(
                    f"{where}: its context of {len(question.context)} characters must "
                    f"read {text!r} at answer_start={start}, but reads {there!r}"
                )
    return questions


def _each(node: Any, key: str, place: str) -> list[tuple[Any, str]]:
    """The entries of a list in an object, and where they are."""
    entries = _get(node, key, list, place)
    return [(entry, f"{place}{key}[{i}].") for i, entry in enumerate(entries)]


def _get(node: Any, key: str, kind: type, place: str) -> Any:
    if not isinstance(node, dict):
        name = type(node).__name__
        raise DataError(f"{place.rstrip('.: ')} must be an object, got {name}")
    if key not in node:
        raise DataError(f"{place}{key} is missing")
    if type(node[key]) is not kind:
        name = type(node[key]).__name__
        raise DataError(f"{place}{key} must be of type {kind.__name__}, got {name}")
    return node[key]
