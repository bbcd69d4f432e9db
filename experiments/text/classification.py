"""Text classification: the tasks of GLUE, including its regression, and your own."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.batches import Batch, Examples
from experiments.errors import ConfigError
from experiments.task import Task
from experiments.text.config import TextConfig
from experiments.text.glue import GlueTask, glue_task
from experiments.text.network import Network, losses, network, predict_all
from experiments.text.scores import label_scores


def labelled_task(config: TextConfig) -> GlueTask:
    """The question that the task of a configuration asks."""
    if labels := config.data.labels:
        return GlueTask(config.data.text_columns, len(labels), ("accuracy",))
    return glue_task(config.data.name)


def make_network(config: TextConfig) -> Network:
    """The network of a configuration."""
    return network(config, "classification", {"labels": labelled_task(config).outputs})


def text_classification(config: TextConfig) -> Task:
    """The task of a configuration.

    The loss is the cross-entropy of the classes, or the mean squared error for the
    regression.

    Args:
      config: the task, the model, the label smoothing, the size of evaluation batches.

    Returns:
      The task; its metrics are those of GLUE.

    Raises:
      ConfigError: labels cannot be smoothed, as they are numbers.
    """
    glue = labelled_task(config)
    if glue.is_regression and config.label_smoothing:
        raise ConfigError(
            f"label_smoothing must be 0 for {config.data.name}, whose labels are "
            f"numbers, got {config.label_smoothing}"
        )
    model = make_network(config)

    def row_losses(logits: jax.Array, batch: Batch, smoothing: float) -> jax.Array:
        if glue.is_regression:
            return (logits[:, 0] - batch["label"]) ** 2
        labels = jax.nn.one_hot(batch["label"], glue.outputs)
        labels = optax.smooth_labels(labels, smoothing)
        return optax.softmax_cross_entropy(logits, labels)

    loss_fn, evaluation_loss = losses(config, model, row_losses)

    @jax.jit
    def predict(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = model.forward(params, batch, False)
        found = logits[:, 0] if glue.is_regression else jnp.argmax(logits, axis=-1)
        return found, row_losses(logits, batch, 0.0)

    def evaluate(params: Any, batch_stats: Any, texts: Examples) -> dict[str, float]:
        del batch_stats
        found, row_loss = predict_all(
            predict, params, texts, config.data.evaluation_batch
        )
        scores = label_scores(glue.metrics, found, texts.arrays["label"])
        return scores | {"loss": float(row_loss.mean())}

    return Task(
        init=model.init,
        augment=lambda key, batch: batch,
        loss_fn=loss_fn,
        evaluate=evaluate,
        predict=model.predict,
        evaluation_loss=evaluation_loss,
        metric=glue.metrics[0],
        filters=model.filters,
        head=("classifier",),
        pretrained=model.pretrained,
    )
