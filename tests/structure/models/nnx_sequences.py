"""Transformers and other networks on sequences in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx
from structure.models.nnx_images import of_nnx
from structure.models.shapes import IMAGES, TOKENS, array

from experiments.text.bert import BertForSequenceClassification
from experiments.text.config import BertConfig


class ReshapeAttention(nnx.Module):
    """Heads by a reshape, as most models write it: (4, -1) or (-1, 4)."""

    def __init__(self, rngs, heads=(4, -1), is_fused=False):
        self.heads, self.is_fused = heads, is_fused
        if is_fused:
            self.qkv = nnx.Linear(16, 48, rngs=rngs)
        else:
            self.query, self.key, self.value = (
                nnx.Linear(16, 16, rngs=rngs) for _ in range(3)
            )
        self.out = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        if self.is_fused:
            projected = jnp.split(self.qkv(x), 3, -1)
        else:
            projected = self.query(x), self.key(x), self.value(x)
        b, t, _ = x.shape
        query, key, value = (y.reshape(b, t, *self.heads) for y in projected)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2.0
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
        return self.out(mixed.reshape(b, t, -1))


class Block(nnx.Module):
    """A layer of a transformer."""

    def __init__(self, attention, rngs):
        self.attention = attention
        self.norm1, self.norm2 = (nnx.LayerNorm(16, rngs=rngs) for _ in range(2))
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


def attention_nnx():
    def make(rngs):
        return Block(nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs), rngs)

    return of_nnx(make, TOKENS)


def heads_by_reshape_nnx():
    return of_nnx(lambda rngs: Block(ReshapeAttention(rngs), rngs), TOKENS)


def units_by_reshape_nnx():
    def make(rngs):
        return Block(ReshapeAttention(rngs, (-1, 4)), rngs)

    return of_nnx(make, TOKENS)


def fused_attention_nnx():
    def make(rngs):
        return Block(ReshapeAttention(rngs, is_fused=True), rngs)

    return of_nnx(make, TOKENS)


class VisionTransformer(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 16, (4, 4), strides=4, rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, 16)))
        self.position = nnx.Param(jnp.zeros((1, 5, 16)))
        self.block1 = Block(ReshapeAttention(rngs, is_fused=True), rngs)
        self.block2 = Block(ReshapeAttention(rngs), rngs)
        self.norm = nnx.LayerNorm(16, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], 1) + self.position[...]
        return self.head(self.norm(self.block2(self.block1(x)))[:, 0])


def vit_nnx():
    return of_nnx(VisionTransformer, IMAGES)


def bert_nnx():
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=20,
    )
    ids, mask = array(2, 5, dtype=jnp.int32), array(2, 5, dtype=jnp.bool_)

    def make(rngs):
        return BertForSequenceClassification(config, rngs=rngs)

    return of_nnx(make, ids, mask, training=False)


class Decoder(nnx.Module):
    """Grouped queries, rotary embeddings, RMS norm and a fused SwiGLU."""

    def __init__(self, rngs, heads=4, shared=2, units=4, hidden=20):
        self.heads, self.shared, self.units = heads, shared, units

        def dense(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.query = dense(16, heads * units)
        self.key, self.value = (dense(16, shared * units) for _ in range(2))
        self.out = dense(heads * units, 16)
        self.gate_up, self.down = dense(16, 2 * hidden), dense(hidden, 16)
        self.norm1, self.norm2, self.norm3 = (
            nnx.RMSNorm(16, rngs=rngs) for _ in range(3)
        )

    def rotate(self, x):
        half = self.units // 2
        angles = jnp.arange(x.shape[1])[:, None] / 100.0 ** (jnp.arange(half) / half)
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def attend(self, x):
        b, t, _ = x.shape
        query = self.rotate(self.query(x).reshape(b, t, self.heads, self.units))
        key = self.rotate(self.key(x).reshape(b, t, self.shared, self.units))
        value = self.value(x).reshape(b, t, self.shared, self.units)
        repeats = self.heads // self.shared
        key, value = (jnp.repeat(y, repeats, axis=2) for y in (key, value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        scores = jnp.where(jnp.tri(t, dtype=bool), scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
        return self.out(mixed.reshape(b, t, -1))

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attend(self.norm1(x))
        gate, up = jnp.split(self.gate_up(self.norm2(x)), 2, -1)
        x = x + self.down(nnx.silu(gate) * up)
        return self.embed.attend(self.norm3(x))


def decoder_nnx():
    return of_nnx(Decoder, array(2, 5, dtype=jnp.int32))


class ScannedBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def scan_nnx():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return ScannedBlock(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(block, x):
        return block(x)

    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return lambda state, x: forward(nnx.merge(graph, state), x), state, TOKENS
