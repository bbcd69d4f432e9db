"""Audits beside scikit-learn, and beside loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.metrics import accuracy_score, roc_auc_score

from cram_jax import audit


@pytest.fixture
def attributes():
    """Logits of five attributes, two of them related, and labels they tell of."""
    rng = np.random.default_rng(0)
    labels = rng.uniform(size=(400, 5)) < [0.5, 0.2, 0.9, 0.05, 0.5]
    labels[:, 4] ^= labels[:, 0] & (rng.uniform(size=400) < 0.8)
    logits = 2 * labels - 1 + rng.normal(size=labels.shape)
    return logits.round(1), labels  # rounded, so that there are ties


def test_accuracy_by_group_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    predictions, labels, groups = rng.integers(0, 4, (3, 200))
    found = audit.by_group(predictions == labels, groups)
    for group in range(4):
        chosen = groups == group
        expected = accuracy_score(labels[chosen], predictions[chosen])
        assert found[group] == pytest.approx(expected)
    apart = 1 - accuracy_score(labels, predictions)
    assert audit.disagreement(predictions, labels) == pytest.approx(apart)


def test_auc_is_that_of_scikit_learn(attributes):
    for scores, outcomes in zip(*(array.T for array in attributes), strict=True):
        expected = roc_auc_score(outcomes, scores)
        assert audit.auc(scores, outcomes) == pytest.approx(expected)
    assert np.isnan(audit.auc([1.0, 2.0], [True, True]))


def test_interdependence_is_that_of_a_linear_regression(attributes):
    predictions = attributes[0] > 0
    predictions = np.column_stack([predictions, np.ones(400, bool)])
    found = audit.interdependence(predictions)
    for attribute in range(5):
        others = np.delete(predictions, attribute, axis=1)
        model = LinearRegression().fit(others, predictions[:, attribute])
        expected = model.score(others, predictions[:, attribute])
        assert found[attribute] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found[5])


def test_calibration_error_sums_over_buckets(attributes):
    chances, outcomes = 1 / (1 + np.exp(-attributes[0][:, 0])), attributes[1][:, 0]
    chances[:3] = 1.0, 0.1, 0.0
    expected = 0.0
    for bucket in range(11):  # the eleventh holds 1
        chosen = [i for i in range(400) if int(10 * chances[i]) == bucket]
        if chosen:
            gap = np.mean(chances[chosen]) - np.mean(outcomes[chosen])
            expected += abs(gap) * len(chosen) / 400
    assert audit.calibration_error(chances, outcomes) == pytest.approx(expected)


def test_buckets_start_where_it_is_said():
    """29 of 100 begins at 0.29, though 100 times that rounds to less."""
    assert audit.calibration_error([0.29, 0.2999], [False, True], buckets=100) < 0.3
    with pytest.raises(ValueError, match="buckets must be at least 1, got 0"):
        audit.calibration_error([0.5], [True], buckets=0)


def test_uncertainty_counts_what_lies_between_a_tenth_and_nine():
    assert audit.uncertainty([0.05, 0.15, 0.5, 0.89, 0.91]) == pytest.approx(0.6)


def test_adjusted_thresholds_predict_as_many_as_are_true(attributes):
    logits = attributes[0] + np.arange(400)[:, None] * 1e-6  # no ties
    thresholds = audit.adjusted_thresholds(logits, attributes[1])
    predicted = (logits > thresholds).sum(axis=0)
    np.testing.assert_array_equal(predicted, attributes[1].sum(axis=0) - 1)
    never = audit.adjusted_thresholds([[1.0], [2.0]], [[False], [False]])
    assert never == np.inf


def test_the_rarer_value_is_that_of_training(attributes):
    logits, labels = attributes
    predictions = logits > 0.5
    found = audit.rare_value_ratio(predictions, labels, labels)
    for attribute in range(5):
        rare = labels[:, attribute].mean() <= 0.5
        counts = [np.sum(a[:, attribute] == rare) for a in (predictions, labels)]
        assert found[attribute] == pytest.approx(counts[0] / counts[1])
    assert np.isnan(audit.rare_value_ratio([[True]], [[False]], [[False]])[0])
    # True is rare in training, though two of three examples have it here.
    predictions, truths = [[True], [False], [False]], [[True], [True], [False]]
    training = [[True], [False], [False], [False]]
    assert audit.rare_value_ratio(predictions, truths, training) == [0.5]


def test_bias_is_amplified_by_a_model_that_predicts_the_group():
    """Of 30 true examples 20 lie in the group, and all predictions do: 1 - 2/3."""
    group = np.arange(60) < 30
    labels = np.zeros((60, 4), bool)
    labels[:20, 0] = labels[30:40, 0] = True  # commoner in the group
    labels[:10, 1] = labels[30:50, 1] = True  # commoner outside
    labels[:15, 2] = labels[30:45, 2] = True  # equally common: undefined
    labels[:20, 3] = labels[30:39, 3] = True  # 9 outside: too few
    predictions = np.repeat(group[:, None], 4, axis=1)
    found = audit.bias_amplification(predictions, labels, group, labels, group)
    np.testing.assert_allclose(found, [1 / 3, -2 / 3, np.nan, np.nan])
    own = group[:, None]
    assert np.isnan(audit.bias_amplification(own, own, group, own, group))
    none = np.zeros_like(labels)
    assert np.isnan(audit.bias_amplification(none, labels, group, labels, group)).all()
    # In training the label goes with the other group, so predictions reverse that.
    for training in ((labels[::-1], group), (labels, ~group)):
        found = audit.bias_amplification(predictions, labels, group, *training)
        assert found[0] == pytest.approx(-1 / 3)
    # 5 % apart is too little to say which group a label goes with; 15 % is enough.
    close = np.zeros((60, 2), bool)
    close[:21, 0] = close[:23, 1] = close[30:50] = True
    found = audit.bias_amplification(close, close, group, close, group)
    np.testing.assert_array_equal(found, [np.nan, 0])
    # True predictions exaggerate nothing.
    found = audit.bias_amplification(labels, labels, group, labels, group)
    np.testing.assert_array_equal(found[:2], 0)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1))
def test_bounds(pairs):
    chances, outcomes = map(np.array, zip(*pairs, strict=True))
    assert 0 <= audit.calibration_error(chances, outcomes) <= 1
    assert audit.calibration_error(outcomes.astype(float), outcomes) == 0
    area = audit.auc(chances, outcomes)
    assert np.isnan(area) or area == pytest.approx(1 - audit.auc(-chances, outcomes))


def test_bad_arrays_are_refused():
    with pytest.raises(ValueError, match="predictions and others must have one shape"):
        audit.disagreement([1, 2], [1])
    with pytest.raises(ValueError, match="at least one example"):
        audit.by_group([], [])
    with pytest.raises(ValueError, match="probabilities must be between 0 and 1"):
        audit.calibration_error([1.5], [True])


def test_an_attribute_that_never_changes_depends_on_nothing():
    """The mean of many 0.1 is not 0.1."""
    predictions = np.column_stack([np.full(10, 0.1), np.arange(10.0)])
    assert np.isnan(audit.interdependence(predictions)[0])


def test_groups_may_be_a_column_of_a_table():
    names = np.array(["b", "a", "b"], object)
    assert audit.by_group([True, False, False], names) == {"a": 0.0, "b": 0.5}


def test_numbers_serve_as_labels():
    labels = np.array([[1.0], [0.0], [1.0]])
    found = audit.adjusted_thresholds([[0.1], [-0.4], [-0.2]], labels)
    np.testing.assert_array_equal(found, [-0.2])


@pytest.mark.parametrize("seen", ["all in the group", "none", "no example true"])
def test_without_two_frequencies_bias_is_undefined(seen):
    group = np.arange(40) < 20
    labels = np.arange(40)[:, None] < 30
    training_labels = labels & (seen != "no example true")
    training_group = group if seen == "no example true" else group | True
    training_group = training_group & (seen != "none")
    found = audit.bias_amplification(
        group[:, None], labels, group, training_labels, training_group
    )
    assert np.isnan(found).all()


def test_training_labels_are_of_the_same_attributes():
    labels = np.ones((3, 2), bool)
    with pytest.raises(ValueError, match="training_labels must have the attributes"):
        audit.rare_value_ratio(labels, labels, labels[:, :1])
    with pytest.raises(ValueError, match="training_labels must have the attributes"):
        audit.bias_amplification(labels, labels, [1, 0, 1], labels[:, :1], [1, 0, 1])
