"""How answers and labels are scored, in per cent.

References: the evaluation of SQuAD v1.1, Rajpurkar et al. 2016, arXiv 1606.05250, and
of GLUE, Wang et al. 2019, arXiv 1804.07461.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def answer_scores(
    predictions: Mapping[str, str], gold: Mapping[str, Iterable[str]]
) -> dict[str, float]:
    """Exact match and F1 of answers, each against the best-matching gold answer.

    Args:
      predictions: the answer to each question's id; missing ones score 0.
      gold: the gold answers to each question's id, at least one.

    Returns:
      ``exact_match`` and ``f1``, means over the questions of ``gold``, from 0 to 100.
    """
    exact = overlap = 0.0
    for question, answers in gold.items():
        if question in predictions:
            found = normalize(predictions[question])
            wanted = [normalize(answer) for answer in answers]
            exact += max(found == answer for answer in wanted)
            overlap += max(word_f1(found, answer) for answer in wanted)
    return {"exact_match": 100 * exact / len(gold), "f1": 100 * overlap / len(gold)}


def normalize(answer: str) -> str:
    """Lower case, without ASCII punctuation, articles and superfluous white space."""
    words = ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION))
    return " ".join(words.split())


def word_f1(found: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words; 0 if none is shared."""
    found_words, wanted_words = found.split(), wanted.split()
    shared = (Counter(found_words) & Counter(wanted_words)).total()
    # This is 2 / (1 / precision + 1 / recall), and 0 rather than 0 / 0.
    return 2 * shared / max(len(found_words) + len(wanted_words), 1)


def label_scores(
    metrics: Sequence[str], predictions: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Scores of classes or numbers.

    Args:
      metrics: "accuracy", "f1" (of class 1), "matthews" (correlation), "pearson" or
        "spearman".
      predictions: (count,), classes, or numbers for the last two.
      labels: (count,), what they should be.

    Returns:
      The metrics, times 100. F1 is 0 if class 1 occurs in neither, and a correlation is
      0 if either side is constant.
    """
    # Slow to import, and needed only here.
    from scipy import stats
    from sklearn import metrics as sklearn_metrics

    functions = {
        "accuracy": lambda: sklearn_metrics.accuracy_score(labels, predictions),
        "f1": lambda: sklearn_metrics.f1_score(labels, predictions, zero_division=0),
        "matthews": lambda: sklearn_metrics.matthews_corrcoef(labels, predictions),
        "pearson": lambda: stats.pearsonr(labels, predictions).statistic,
        "spearman": lambda: stats.spearmanr(labels, predictions).statistic,
    }
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        functions |= dict.fromkeys(("matthews", "pearson", "spearman"), lambda: 0)
    return {name: 100 * float(functions[name]()) for name in metrics}
