"""Question answering: where in a context the answer starts and ends."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.batches import Batch, Examples
from experiments.task import Task
from experiments.text.config import TextConfig
from experiments.text.data import QuestionSet
from experiments.text.network import Network, losses, network, predict_all
from experiments.text.scores import answer_scores
from experiments.text.squad import best_answers


def make_network(config: TextConfig) -> Network:
    """The network of a configuration."""
    return network(config, "question_answering")


def question_answering(config: TextConfig) -> Task:
    """The task of a configuration.

    The loss is the cross-entropy over the tokens of a row, the mean of that of the
    answer's start and that of its end; label smoothing spreads a share of either over
    the tokens that are not padding.

    Args:
      config: the model, the label smoothing, the size of evaluation batches.

    Returns:
      The task; its metrics are ``f1`` and ``exact_match``.
    """
    model = make_network(config)

    def row_losses(
        logits: tuple[jax.Array, jax.Array], batch: Batch, smoothing: float
    ) -> jax.Array:
        tokens = batch["attention_mask"].astype(jnp.float32)
        # A row that pads a batch has none.
        tokens /= jnp.maximum(tokens.sum(axis=-1, keepdims=True), 1)
        total = jnp.zeros(len(tokens))
        for scores, place in zip(logits, (batch["start"], batch["end"]), strict=True):
            wanted = jax.nn.one_hot(place, scores.shape[-1])
            wanted = (1 - smoothing) * wanted + smoothing * tokens
            total -= jnp.sum(wanted * jax.nn.log_softmax(scores), axis=-1) / 2
        return total

    loss_fn, evaluation_loss = losses(config, model, row_losses)

    @jax.jit
    def predict(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = model.forward(params, batch, False)
        return *logits, row_losses(logits, batch, 0.0)

    def evaluate(params: Any, batch_stats: Any, asked: QuestionSet) -> dict[str, float]:
        del batch_stats
        rows = Examples(asked.windows.features)
        size = config.data.evaluation_batch
        start, end, row_loss = predict_all(predict, params, rows, size)
        answers = best_answers(asked.questions, asked.windows, start, end)
        gold = {q.id: [answer.text for answer in q.answers] for q in asked.questions}
        scores = answer_scores(answers, gold)
        return {
            "f1": scores["f1"],
            "exact_match": scores["exact_match"],
            "loss": float(row_loss.mean()),
        }

    return Task(
        init=model.init,
        augment=lambda key, batch: batch,
        loss_fn=loss_fn,
        evaluate=evaluate,
        predict=model.predict,
        evaluation_loss=evaluation_loss,
        metric="f1",
        filters=model.filters,
        head=("qa_outputs",),
        pretrained=model.pretrained,
    )
