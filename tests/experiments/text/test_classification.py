"""The tasks of GLUE: classes, numbers, and their metrics."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.batches import Examples
from experiments.errors import ConfigError
from experiments.text.classification import make_network, text_classification
from experiments.text.config import TextDataConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
NAMES = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture(scope="module")
def config(text_config):
    """Makes a configuration of a task."""

    def make(name, smoothing=0.0):
        return dataclasses.replace(
            text_config,
            data=TextDataConfig(name=name, max_length=12, evaluation_batch=4),
            model=dataclasses.replace(
                text_config.model,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            label_smoothing=smoothing,
            train_file=None,
            eval_file=None,
        )

    return make


@pytest.fixture(scope="module")
def texts():
    """Seven rows of 12 random tokens, some of them padding."""
    generator = np.random.default_rng(0)
    mask = (np.arange(12) < generator.integers(4, 13, (7, 1))).astype(np.int32)
    ids = generator.integers(4, 20, (7, 12)).astype(np.int32) * mask
    return dict(zip(NAMES, (ids, mask, np.zeros_like(mask)), strict=True))


def logits_of(config, params, texts):
    model = make_network(config).module(params)
    inputs = (jnp.asarray(texts[name]) for name in NAMES)
    return np.asarray(model(*inputs, training=False), np.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classes_have_a_cross_entropy(smoothing, config, texts):
    config = config("mnli", smoothing)
    task = text_classification(config)
    params, _ = task.init(1)
    labels = np.array([0, 1, 2, 2, 1, 0, 0], np.int32)
    logits = logits_of(config, params, texts)
    log_shares = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    wanted = (1 - smoothing) * np.eye(3)[labels] + smoothing / 3
    batch = texts | {"label": labels}
    expected = -np.sum(wanted * log_shares) / 7
    assert task.loss_fn(params, {}, batch)[0] == pytest.approx(expected, rel=1e-5)
    found = task.evaluate(params, {}, Examples(batch))
    right = 100 * np.mean(logits.argmax(axis=-1) == labels)
    loss = -np.mean(log_shares[np.arange(7), labels])
    assert found == pytest.approx({"accuracy": right, "loss": loss}, rel=1e-5)
    assert task.evaluation_loss(params, {}, batch) == pytest.approx(loss, rel=1e-5)


def test_a_regression_has_a_squared_error_and_correlations(config, texts):
    config = config("stsb")
    task = text_classification(config)
    params, _ = task.init(1)
    labels = np.array([0.0, 1.5, 2.0, 5.0, 3.3, 4.1, 0.2], np.float32)
    batch = texts | {"label": labels}
    scores = logits_of(config, params, texts)[:, 0]
    expected = np.mean((scores - labels) ** 2)
    assert task.loss_fn(params, {}, batch)[0] == pytest.approx(expected, rel=1e-5)
    found = task.evaluate(params, {}, Examples(batch))
    assert list(found) == ["pearson", "spearman", "loss"]
    assert task.metric == "pearson"
    correlation = 100 * stats.pearsonr(scores, labels).statistic
    assert found["pearson"] == pytest.approx(correlation, rel=1e-3)


def test_numbers_are_not_smoothed(config):
    with pytest.raises(ConfigError, match="label_smoothing must be 0 for stsb"):
        text_classification(config("stsb", 0.1))
