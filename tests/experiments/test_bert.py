"""BERT: shapes, sizes, padding, dropout, and its place in plain trees."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models.bert import (
    BertForQuestionAnswering,
)
from experiments.models.bert_config import BertConfig

MINUTE = BertConfig(
    vocab_size=37,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=9,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 37, (3, 7)))
MASK = jnp.asarray([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]])


def split(model):
    graph, params = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(params)


def abstractly(make):
    return split(nnx.eval_shape(make))


def test_plain_trees_go_through_split_and_merge():
    graph, params = split(BertForQuestionAnswering(MINUTE, rngs=nnx.Rngs(0)))

    @jax.jit
    def loss_fn(params, key):
        model = nnx.merge(graph, params, copy=True)
        start, end = model(IDS, MASK, training=True, dropout_key=key)
        return jnp.mean(start**2) + jnp.mean(end**2)

    gradient = jax.grad(loss_fn)(params, jax.random.key(0))
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
