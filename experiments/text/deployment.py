"""BERTs in the form that engines take."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.batches import Batch, Examples
from experiments.deployment.graphs import bert_graph
from experiments.deployment.network import (
    Inputs,
    Network,
    Samples,
    Scored,
    make_samples,
)
from experiments.text import classification, question_answering
from experiments.text.config import TextConfig
from experiments.text.data import QuestionSet, TextDataset
from experiments.text.scores import answer_scores, label_scores
from experiments.text.squad import best_answers

NAMES = ("input_ids", "attention_mask", "token_type_ids")


def deploy(
    config: TextConfig, data: TextDataset, params: Any, batch_stats: Any
) -> Network:
    """The network of a run with these parameters; it has three integer inputs."""
    del data, batch_stats
    return text_network(config, params)


def text_network(config: TextConfig, params: Any) -> Network:
    """A BERT with the head of its task."""
    model = dataclasses.replace(config.model, dtype="float32")
    exact = dataclasses.replace(config, model=model)
    asks = config.data.asks_questions
    make = (question_answering if asks else classification).make_network
    network = make(exact)

    @jax.jit
    def forward(params: Any, *inputs: jax.Array) -> jax.Array:
        batch = dict(zip(NAMES, inputs, strict=True))
        outputs = network.forward(params, batch, False)
        return jnp.stack(outputs, axis=-1) if asks else outputs

    params = jax.device_put(params)
    nbytes = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    graph = partial(bert_graph, network.module(params))
    return Network(partial(forward, params), nbytes, NAMES, "logits", graph)


def samples(config: TextConfig, data: TextDataset) -> Samples:
    """The rows of a run, padded to its ``max_length``."""

    def as_inputs(batch: Batch) -> Inputs:
        return tuple(np.ascontiguousarray(batch[name], np.int32) for name in NAMES)

    def answers(scored: Scored) -> float:
        outputs = np.concatenate([logits for logits, _ in scored])
        assert isinstance(judged, QuestionSet)
        start, end = outputs[..., 0], outputs[..., 1]
        found = best_answers(judged.questions, judged.windows, start, end)
        gold = {q.id: [answer.text for answer in q.answers] for q in judged.questions}
        return answer_scores(found, gold)["f1"]

    def labels(scored: Scored) -> float:
        glue = classification.labelled_task(config)
        logits, batches = zip(*scored, strict=True)
        found = np.concatenate(logits)
        chosen = found[:, 0] if glue.is_regression else found.argmax(axis=-1)
        wanted = np.concatenate([batch["label"] for batch in batches])
        return label_scores(glue.metrics[:1], chosen, wanted)[glue.metrics[0]]

    judged, size = data.evaluation, config.data.evaluation_batch
    if isinstance(judged, QuestionSet):
        rows = Examples(judged.windows.features)
        return make_samples(data.train, rows, as_inputs, answers, "f1", size)
    metric = classification.labelled_task(config).metrics[0]
    return make_samples(data.train, judged, as_inputs, labels, metric, size)
