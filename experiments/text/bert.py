"""BERT (Devlin et al., 2019, arXiv 1810.04805) with two task heads, in Flax NNX.

The arithmetic is that of Hugging Face's BertModel, so that its weights give the same
numbers; see `experiments.text.huggingface` for reading and writing them. Two things
differ on purpose: the padding token's embedding is an ordinary row, trained like the
others, and a sequence whose mask is all zeros attends evenly to all of it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.errors import ConfigError
from experiments.text.config import BertConfig


class Encoded(NamedTuple):
    """The output of the encoder.

    Attributes:
      hidden: (batch, length, hidden_size), the last layer's output.
      pooled: (batch, hidden_size), or None without a pooler.
    """

    hidden: jax.Array
    pooled: jax.Array | None


class Embeddings(nnx.Module):
    """The normalised sum of word, position and segment embeddings."""

    def __init__(self, config: BertConfig, dtype: Any, rngs: nnx.Rngs):
        embed = partial(
            nnx.Embed,
            features=config.hidden_size,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        self.token_type = embed(config.type_vocab_size)
        self.norm = _norm(config, dtype, rngs)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Maps two integer arrays (batch, length) to features."""
        # Not through Embed's call, which casts the whole table to the dtype it was made
        # with.
        word, position, token_type = (
            table.embedding[...]
            for table in (self.word, self.position, self.token_type)
        )
        x = jnp.take(word, input_ids, axis=0) + position[: input_ids.shape[1]]
        x = self.norm(x + jnp.take(token_type, token_type_ids, axis=0))
        return self.dropout(x, deterministic=key is None, rngs=key)


class SelfAttention(nnx.Module):
    """Multi-head self-attention, with its output layer."""

    def __init__(self, config: BertConfig, heads: int, dtype: Any, rngs: nnx.Rngs):
        self.heads = heads
        inner = heads * config.head_size
        dense = partial(_dense, config, dtype=dtype, rngs=rngs)
        self.query = dense(config.hidden_size, inner)
        self.key = dense(config.hidden_size, inner)
        self.value = dense(config.hidden_size, inner)
        self.output = dense(inner, config.hidden_size)
        self.dropout = nnx.Dropout(config.attention_probs_dropout_prob)

    def __call__(
        self, x: jax.Array, mask: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Maps features to features; ``mask`` (batch, length) is True for tokens."""
        query, keys, value = (
            dense(x).reshape(*x.shape[:2], self.heads, -1)
            for dense in (self.query, self.key, self.value)
        )
        # At least float32, whatever the dtype of the computation.
        wide = jnp.promote_types(query.dtype, jnp.float32)
        scores = jnp.einsum(
            "bqhd,bkhd->bhqk", query, keys, preferred_element_type=wide
        ) / jnp.sqrt(jnp.asarray(query.shape[-1], wide))
        # The lowest number instead of -inf: a mask of zeros must not give NaN.
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
        weights = jax.nn.softmax(scores).astype(value.dtype)
        weights = self.dropout(weights, deterministic=key is None, rngs=key)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.output(attended.reshape(*x.shape[:2], -1))


class Layer(nnx.Module):
    """Attention, then two dense layers, each with a residual and a layer norm."""

    def __init__(
        self, config: BertConfig, heads: int, units: int, dtype: Any, rngs: nnx.Rngs
    ):
        dense = partial(_dense, config, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(config, heads, dtype, rngs)
        self.attention_norm = _norm(config, dtype, rngs)
        self.intermediate = dense(config.hidden_size, units)
        self.output = dense(units, config.hidden_size)
        self.output_norm = _norm(config, dtype, rngs)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)

    def __call__(
        self, x: jax.Array, mask: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Maps features to features; ``mask`` (batch, length) is True for tokens."""
        in_attention, after_attention, at_the_end = _split(key, 3)
        y = self.attention(x, mask, in_attention)
        y = self.dropout(y, deterministic=key is None, rngs=after_attention)
        x = self.attention_norm(x + y)
        y = self.output(nnx.gelu(self.intermediate(x), approximate=False))
        y = self.dropout(y, deterministic=key is None, rngs=at_the_end)
        return self.output_norm(x + y)


class Bert(nnx.Module):
    """The encoder, whose layers are ``layer0``, ``layer1`` and so on.

    Args:
      config: its shape.
      pooler: whether the first token's features also go through a dense layer and
        tanh; the classifier reads them.
      dtype: of the computation, such as ``jnp.bfloat16``; by default that of the
        parameters. These are float32, and so are the softmax, the statistics of the
        layer norms and the task heads, whatever the dtype.
      rngs: where the initial weights come from.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        pooler: bool = True,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.rates = (config.hidden_dropout_prob, config.attention_probs_dropout_prob)
        self.embeddings = Embeddings(config, dtype, rngs)
        # Named, not numbered: integer keys come back from checkpoints as strings.
        self.order = tuple(f"layer{i}" for i in range(config.num_hidden_layers))
        for name, heads, units in zip(
            self.order, config.heads_of_layers, config.units_of_layers, strict=True
        ):
            setattr(self, name, Layer(config, heads, units, dtype, rngs))
        self.has_pooler = pooler
        if pooler:
            self.pooler = _dense(
                config, config.hidden_size, config.hidden_size, dtype, rngs
            )

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        training: bool,
        dropout_key: jax.Array | None = None,
    ) -> Encoded:
        """Encodes integer arrays of shape (batch, length).

        Args:
          input_ids: the tokens.
          attention_mask: non-zero for tokens, zero for padding; by default no padding.
          token_type_ids: the segment of each token; by default 0.
          training: whether dropout acts.
          dropout_key: its PRNG key; not needed if there is no dropout.

        Returns:
          The features of every token, including padding, and the pooled ones.

        Raises:
          ConfigError: the sequence is too long, or dropout lacks a key.
        """
        limit = self.config.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise ConfigError(
                f"input_ids must have at most max_position_embeddings={limit} tokens "
                f"a sequence, got {input_ids.shape[1]}"
            )
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        key = _dropout_key(training, dropout_key, self.rates)
        first, *others = _split(key, 1 + len(self.order))
        x = self.embeddings(input_ids, token_type_ids, first)
        for name, layer_key in zip(self.order, others, strict=True):
            x = getattr(self, name)(x, attention_mask != 0, layer_key)
        return Encoded(x, jnp.tanh(self.pooler(x[:, 0])) if self.has_pooler else None)


class BertForQuestionAnswering(nnx.Module):
    """The encoder and, for every token, whether the answer starts or ends there."""

    def __init__(self, config: BertConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.bert = Bert(config, pooler=False, dtype=dtype, rngs=rngs)
        self.qa_outputs = _dense(config, config.hidden_size, 2, None, rngs)

    def __call__(self, *inputs: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        """Takes the arguments of Bert; returns two logits, each (batch, length)."""
        logits = self.qa_outputs(self.bert(*inputs, **options).hidden)
        return logits[..., 0], logits[..., 1]


class BertForSequenceClassification(nnx.Module):
    """The encoder and a classifier of its pooled output."""

    def __init__(
        self,
        config: BertConfig,
        labels: int = 2,
        *,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.bert = Bert(config, dtype=dtype, rngs=rngs)
        rate = config.classifier_dropout
        self.dropout = nnx.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.classifier = _dense(config, config.hidden_size, labels, None, rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        training: bool,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Takes the arguments of Bert; returns logits (batch, labels)."""
        key = _dropout_key(training, dropout_key, (self.dropout.rate, *self.bert.rates))
        inside, at_the_end = _split(key, 2)
        inputs = (input_ids, attention_mask, token_type_ids)
        pooled = self.bert(*inputs, training=training, dropout_key=inside).pooled
        pooled = self.dropout(pooled, deterministic=key is None, rngs=at_the_end)
        return self.classifier(pooled)


def _dense(
    config: BertConfig, inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs
) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)


def _norm(config: BertConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        use_fast_variance=False,  # E[x^2] - E[x]^2 is too inexact for 1e-12
        dtype=dtype,
        rngs=rngs,
    )


def _dropout_key(
    training: bool, key: jax.Array | None, rates: tuple[float, ...]
) -> jax.Array | None:
    """The key if dropout acts, else None."""
    if not training or not any(rates):
        return None
    if key is None:
        raise ConfigError("dropout_key must be a key when training with dropout")
    return key


def _split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))
