"""What compression changed, and for whom: pure functions of NumPy arrays.

Accuracy does not tell the whole story: a compressed network of the same accuracy may
give different answers, be less sure of them, or fail one group more than the rest.

Reference: Iofinova, Peste and Alistarh, Bias in Pruned Vision Models, CVPR 2023,
arXiv 2304.12622. `bias_amplification`, `uncertainty`, `interdependence`,
`calibration_error`, `rare_value_ratio` and `adjusted_thresholds` are its criteria, for
binary attributes.
"""

from typing import Any, TypeAlias

import numpy as np

from cram_jax.validation import check_integer

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_FEWEST = 10
_SMALLEST_DIFFERENCE = 0.1


def disagreement(predictions: Any, others: Any) -> float:
    """The share of examples that two models answer differently.

    Args:
      predictions: those of one model, shape (examples, ...).
      others: those of the other model, of the same shape.

    Returns:
      The share, from 0 to 1.

    Raises:
      ValueError: the shapes differ, or there is no example.

    Example:
      >>> from cram_jax import audit
      >>> audit.disagreement([0, 1, 2, 2], [0, 1, 2, 3])
      0.25
    """
    first, second = _alike(predictions=predictions, others=others)
    return float(np.mean(first != second))


def by_group(values: Any, groups: Any) -> dict[Any, float]:
    """The mean of each group, such as accuracy by class.

    Args:
      values: (examples,), such as whether each answer was right.
      groups: (examples,), the group of each example.

    Returns:
      The means, in the order of the groups.

    Raises:
      ValueError: the shapes differ, or there is no example.

    Example:
      >>> from cram_jax import audit
      >>> audit.by_group([True, False, True], ["a", "a", "b"])
      {'a': 0.5, 'b': 1.0}
    """
    numbers, names = _alike(values=values, groups=groups)
    found = np.unique(names)
    return {
        name: float(numbers[names == group].mean())
        for name, group in zip(found.tolist(), found, strict=True)
    }


def calibration_error(probabilities: Any, outcomes: Any, *, buckets: int = 10) -> float:
    """How far probabilities are from how often they come true, on average.

    The mean over examples of ``|mean probability - mean outcome|`` in their bucket. The
    i-th bucket starts at ``i / buckets``; 1 has a bucket of its own. For several
    classes, pass the probability of the predicted class and whether it was right.

    Args:
      probabilities: (examples,), from 0 to 1.
      outcomes: (examples,), whether each came true.
      buckets: the number of buckets, at least 1.

    Returns:
      The mean, from 0 to 1.

    Raises:
      ValueError: the shapes differ, there is no example, a probability is not between
        0 and 1, or ``buckets`` is below 1.
      TypeError: ``buckets`` is not an integer.

    Example:
      >>> from cram_jax import audit
      >>> round(audit.calibration_error([0.9, 0.9, 0.2], [True, False, False]), 3)
      0.333
    """
    chances, truths = _alike(probabilities=probabilities, outcomes=outcomes)
    if not ((chances >= 0) & (chances <= 1)).all():
        raise ValueError("probabilities must be between 0 and 1")
    check_integer("buckets", buckets, 1)
    bucket = np.searchsorted(np.arange(buckets + 1) / buckets, chances, "right")
    gaps = [
        abs(chances[bucket == b].mean() - truths[bucket == b].mean())
        * np.mean(bucket == b)
        for b in np.unique(bucket)
    ]
    return float(sum(gaps))


def uncertainty(probabilities: Any) -> float:
    """The share of predictions that are less than 90 % sure of either answer.

    Args:
      probabilities: of attributes, from 0 to 1, of any shape.

    Returns:
      The share, from 0 to 1.

    Example:
      >>> from cram_jax import audit
      >>> audit.uncertainty([0.05, 0.5, 0.85, 0.95])
      0.5
    """
    return float(np.mean(np.abs(np.asarray(probabilities) - 0.5) < 0.4))


def interdependence(predictions: Any) -> Array:
    """How well each predicted attribute follows from the others.

    The coefficient of determination of a linear regression on them, which is high for a
    model that confuses one attribute with another.

    Args:
      predictions: (examples, attributes), numbers or bools.

    Returns:
      For each attribute, a number up to 1; NaN for one that never changes.

    Example:
      >>> from cram_jax import audit
      >>> audit.interdependence([[0, 0], [1, 1], [0, 0], [1, 1]]).round(3)
      array([1., 1.])
    """
    values = np.asarray(predictions, np.float64)
    found = []
    for attribute, column in enumerate(values.T):
        others = np.delete(values, attribute, axis=1)
        design = np.column_stack([others, np.ones(len(values))])
        residual = column - design @ np.linalg.lstsq(design, column)[0]
        total = np.sum((column - column.mean()) ** 2)
        changes = column.min() < column.max()  # a rounded mean may differ from it
        found.append(1 - residual @ residual / total if changes else np.nan)
    return np.array(found)


def rare_value_ratio(predictions: Any, labels: Any, training_labels: Any) -> Array:
    """How often the rarer value of each attribute is predicted, relative to the truth.

    Below 1, the model favours the value that it saw more often in training.

    Args:
      predictions: (examples, attributes), bool.
      labels: (examples, attributes), bool.
      training_labels: (training examples, attributes), bool: they decide which value is
        rarer; True if neither is.

    Returns:
      For each attribute, the ratio; NaN if the value never occurs in ``labels``.

    Raises:
      ValueError: predictions and labels differ in shape, or have no example; or the
        training labels have another number of attributes.

    Example:
      >>> from cram_jax import audit
      >>> predictions, labels = [[True], [False]], [[True], [True]]
      >>> audit.rare_value_ratio(predictions, labels, [[True], [False], [False]])
      array([0.5])
    """
    guesses, truths = _alike(predictions=predictions, labels=labels)
    seen = _training_labels(training_labels, truths)
    is_true_rarer = np.mean(seen, axis=0) <= 0.5
    predicted = np.mean(guesses == is_true_rarer, axis=0)
    share = np.mean(truths == is_true_rarer, axis=0)
    return np.divide(predicted, share, out=np.full(len(share), np.nan), where=share > 0)


def auc(scores: Any, outcomes: Any) -> float:
    """The chance that a true example scores above a false one; ties count half.

    The area under the ROC curve.

    Args:
      scores: (examples,).
      outcomes: (examples,), bool.

    Returns:
      The area; NaN if all outcomes are the same.

    Raises:
      ValueError: the shapes differ, or there is no example.

    Example:
      >>> from cram_jax import audit
      >>> audit.auc([0.1, 0.4, 0.4, 0.8], [False, True, False, True])
      0.875
    """
    numbers, truths = _alike(scores=scores, outcomes=outcomes)
    truths = truths.astype(bool)
    positive, negative = int(truths.sum()), int((~truths).sum())
    if not positive or not negative:
        return float("nan")
    _, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    above = ranks[truths].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def adjusted_thresholds(logits: Any, labels: Any) -> Array:
    """Thresholds with which each attribute is predicted as often as it is true.

    The paper's remedy for pruned networks that predict rare values too rarely. If n
    examples are true, the threshold is the n-th largest logit; ``logits > thresholds``
    then predicts n - 1.

    Args:
      logits: (examples, attributes), on held-out data.
      labels: (examples, attributes), bool.

    Returns:
      A threshold for each attribute; infinite for one that is never true.

    Raises:
      ValueError: the shapes differ, or there is no example.

    Example:
      >>> from cram_jax import audit
      >>> audit.adjusted_thresholds([[0.1], [-0.4], [-0.2]], [[True], [False], [True]])
      array([-0.2])
    """
    numbers, truths = _alike(logits=logits, labels=labels)
    descending = -np.sort(-numbers, axis=0)
    counts = np.sum(truths.astype(bool), axis=0)
    found = [
        descending[count - 1, attribute] if count else np.inf
        for attribute, count in enumerate(counts)
    ]
    return np.array(found)


def bias_amplification(
    predictions: Any,
    labels: Any,
    group: Any,
    training_labels: Any,
    training_group: Any,
) -> Array:
    """How much a model exaggerates an attribute's correlation with a group.

    If an attribute was more common inside the group than outside in training: the
    group's share of the examples for which it is predicted, minus its share of those
    for which it is true. Otherwise the same for the examples outside the group. Above
    0, the model exaggerates.

    Args:
      predictions: (examples, attributes), bool.
      labels: (examples, attributes), bool.
      group: (examples,), bool.
      training_labels: (training examples, attributes), bool.
      training_group: (training examples,), bool.

    Returns:
      For each attribute; NaN if the training frequencies are equal or differ by less
      than a tenth of the smaller one, or one is of no example; if the attribute is the
      group itself, it is true for fewer than 10 examples in the group or outside, or it
      is never predicted.

    Raises:
      ValueError: predictions and labels differ in shape, or have no example; or the
        training labels have another number of attributes.

    Example:
      >>> from cram_jax import audit
      >>> import numpy as np
      >>> group = np.arange(40) < 20
      >>> labels = np.arange(40)[:, None] % 40 < 30  # 20 in the group, 10 outside
      >>> predictions = group[:, None]
      >>> audit.bias_amplification(predictions, labels, group, labels, group).round(3)
      array([0.333])
    """
    guesses, truths = _alike(predictions=predictions, labels=labels)
    inside = np.asarray(group, bool)
    seen = _training_labels(training_labels, truths)
    where = np.asarray(training_group, bool)
    if where.all() or not where.any():
        return np.full(truths.shape[1], np.nan)
    found = []
    for guess, truth, training in zip(guesses.T, truths.T, seen.T, strict=True):
        frequencies = training[where].mean(), training[~where].mean()
        side = inside if frequencies[0] > frequencies[1] else ~inside
        apart = abs(frequencies[0] - frequencies[1])
        undefined = (
            apart == 0
            or apart < _SMALLEST_DIFFERENCE * min(frequencies)
            or np.array_equal(truth.astype(bool), inside)
            or min(truth[inside].sum(), truth[~inside].sum()) < _FEWEST
            or not guess.sum()
        )
        amplified = np.nan
        if not undefined:
            amplified = (
                guess[side].sum() / guess.sum() - truth[side].sum() / truth.sum()
            )
        found.append(amplified)
    return np.array(found)


def _training_labels(labels: Any, truths: Array) -> Array:
    """The labels, checked: of as many attributes as the true ones."""
    seen = np.asarray(labels)
    if seen.shape[1:] != truths.shape[1:]:
        raise ValueError(
            f"training_labels must have the attributes of labels, of the shape "
            f"{truths.shape}, got the shape {seen.shape}"
        )
    return seen


def _alike(**arrays: Any) -> list[Array]:
    """The arrays, checked: of one shape, with at least one example."""
    found = {name: np.asarray(array) for name, array in arrays.items()}
    shapes = {name: array.shape for name, array in found.items()}
    if len(set(shapes.values())) > 1 or 0 in next(iter(shapes.values()))[:1]:
        raise ValueError(
            f"{' and '.join(shapes)} must have one shape, with at least one example, "
            f"got {' and '.join(map(str, shapes.values()))}"
        )
    return list(found.values())
