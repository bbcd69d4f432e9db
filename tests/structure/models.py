"""Models of four frameworks, abstract: nothing is initialised or compiled.

Each function returns ``(apply, variables, *inputs)`` of shapes.
"""

from functools import partial

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from experiments.images.resnet import Bottleneck, ResNet
from experiments.text.bert import BertForSequenceClassification
from experiments.text.config import BertConfig


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


KEY = jax.eval_shape(lambda: jax.random.key(0))
IMAGES = array(2, 8, 8, 3)
TOKENS = array(2, 5, 16)


def of_nnx(make, *inputs, **options):
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return lambda state, *x: nnx.merge(graph, state)(*x, **options), state, *inputs


def of_linen(module, *inputs):
    variables = jax.eval_shape(module.init, KEY, *inputs)
    return lambda variables, *x: module.apply(variables, *x), variables, *inputs


def of_equinox(make, *inputs):
    model = eqx.filter_eval_shape(make, KEY)
    arrays, static = eqx.partition(model, lambda leaf: hasattr(leaf, "shape"))
    return (
        lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x),
        arrays,
        *inputs,
    )


def of_haiku(function, *inputs):
    model = hk.without_apply_rng(hk.transform_with_state(function))
    variables = jax.eval_shape(model.init, KEY, *inputs)
    return lambda v, *x: model.apply(v[0], v[1], *x)[0], variables, *inputs


def resnet_nnx():
    def make(rngs):
        return ResNet((8, 16), (2, 2), 3, 10, rngs=rngs)

    return of_nnx(make, IMAGES, training=False)


def bottleneck_resnet_nnx():
    def make(rngs):
        return ResNet(
            (8, 16), (1, 2), 3, 10, block=Bottleneck, imagenet_stem=True, rngs=rngs
        )

    return of_nnx(make, array(1, 16, 16, 3), training=False)


class Vgg(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(8, 12, (3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(12 * 4, 24, rngs=rngs)
        self.dense2 = nnx.Linear(24, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.sigmoid(self.conv2(x)), (2, 2), (2, 2))
        return self.dense2(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))


def vgg_nnx():
    return of_nnx(Vgg, IMAGES)


class InvertedBottleneck(nnx.Module):
    """The block of MobileNet and EfficientNet: depthwise, squeeze and excite."""

    def __init__(self, inputs, outputs, width, rngs):
        def conv(i, o, size, **options):
            return nnx.Conv(i, o, size, use_bias=False, rngs=rngs, **options)

        def norm(size):
            return nnx.BatchNorm(size, use_running_average=True, rngs=rngs)

        self.expand, self.norm1 = conv(inputs, width, (1, 1)), norm(width)
        self.depthwise = conv(width, width, (3, 3), feature_group_count=width)
        self.norm2 = norm(width)
        self.squeeze = nnx.Linear(width, width // 4, rngs=rngs)
        self.excite = nnx.Linear(width // 4, width, rngs=rngs)
        self.project, self.norm3 = conv(width, outputs, (1, 1)), norm(outputs)
        self.is_residual = inputs == outputs

    def __call__(self, x):
        y = nnx.relu6(self.norm1(self.expand(x)))
        y = nnx.relu6(self.norm2(self.depthwise(y)))
        gate = self.excite(nnx.silu(self.squeeze(y.mean((1, 2)))))
        y = y * nnx.sigmoid(gate)[:, None, None]
        y = self.norm3(self.project(y))
        return x + y if self.is_residual else y


class MobileNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.block1 = InvertedBottleneck(8, 8, 16, rngs)
        self.block2 = InvertedBottleneck(8, 12, 32, rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block2(self.block1(self.stem(x))).mean((1, 2)))


def mobilenet_nnx():
    return of_nnx(MobileNet, IMAGES)


class DenseNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        widths = [8 + 6 * i for i in range(3)]
        self.norms = nnx.List(
            [nnx.BatchNorm(w, use_running_average=True, rngs=rngs) for w in widths]
        )
        self.convs = nnx.List([nnx.Conv(w, 6, (3, 3), rngs=rngs) for w in widths])
        self.head = nnx.Linear(26, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = jnp.concatenate([x, conv(nnx.relu(norm(x)))], -1)
        return self.head(x.mean((1, 2)))


def densenet_nnx():
    return of_nnx(DenseNet, IMAGES)


class UNet(nnx.Module):
    def __init__(self, rngs):
        self.down1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.down2 = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.middle = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(16, num_groups=4, rngs=rngs)
        self.up = nnx.ConvTranspose(16, 8, (2, 2), strides=2, rngs=rngs)
        self.merge = nnx.Conv(16, 8, (3, 3), rngs=rngs)
        self.out = nnx.Conv(8, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        skip = nnx.relu(self.down1(x))
        x = nnx.relu(self.norm(self.middle(nnx.relu(self.down2(skip)))))
        x = jnp.concatenate([skip, self.up(x)], -1)
        return self.out(nnx.relu(self.merge(x)))


def unet_nnx():
    return of_nnx(UNet, IMAGES)


class ShuffleNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 12, (1, 1), rngs=rngs)
        self.grouped = nnx.Conv(12, 12, (3, 3), feature_group_count=3, rngs=rngs)
        self.conv2 = nnx.Conv(12, 12, (1, 1), rngs=rngs)
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        x = self.grouped(nnx.relu(self.conv1(x)))
        n, h, w, c = x.shape
        x = x.reshape(n, h, w, 3, 4).swapaxes(-1, -2).reshape(n, h, w, c)
        return self.head(nnx.relu(self.conv2(x)).mean((1, 2)))


def shufflenet_nnx():
    return of_nnx(ShuffleNet, IMAGES)


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


class CnnLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(12, (3, 3))(x)).reshape(x.shape[0], -1)
        return nn.Dense(5)(nn.tanh(nn.Dense(16)(x)))


def cnn_linen():
    return of_linen(CnnLinen(), IMAGES)


class TransformerLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(24)(nn.LayerNorm()(x))))


def attention_linen():
    return of_linen(TransformerLinen(), TOKENS)


class LayerLinen(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16)(nn.gelu(nn.Dense(24)(nn.LayerNorm()(x)))), None


class ScanLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(LayerLinen),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers()(x, None)
        return nn.Dense(4)(x)


def scan_linen():
    return of_linen(ScanLinen(), TOKENS)


class ConvNextLinen(nn.Module):
    """Depthwise 7 x 7, layer norm, inverted bottleneck, layer scale, residual."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=2)(x)
        y = nn.Conv(8, (7, 7), feature_group_count=8)(x)
        y = nn.Dense(32)(nn.LayerNorm()(y))
        y = nn.Dense(8)(nn.gelu(y))
        x = x + y * self.param("scale", nn.initializers.constant(1e-6), (8,))
        return nn.Dense(3)(nn.LayerNorm()(x.mean((1, 2))))


def convnext_linen():
    return of_linen(ConvNextLinen(), IMAGES)


class LstmLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(12))(x)[:, -1])


def lstm_linen():
    return of_linen(LstmLinen(), TOKENS)


def mlp_equinox():
    return of_equinox(lambda key: eqx.nn.MLP(6, 3, 16, 3, key=key), array(4, 6))


def cnn_equinox():
    def make(key):
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(3, 8, 3, padding=1, key=key),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.MaxPool2d(2, 2),
                eqx.nn.Conv2d(8, 6, 3, padding=1, key=key),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.Linear(6 * 16, 10, key=key),
                eqx.nn.Lambda(jax.nn.softplus),
                eqx.nn.Linear(10, 4, key=key),
            ]
        )

    return of_equinox(make, array(2, 3, 8, 8))


class AttentionEquinox(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(4, 16, key=key)

    def __call__(self, x):
        return self.attention(x, x, x)


def attention_equinox():
    return of_equinox(AttentionEquinox, TOKENS)


class RecurrentEquinox(eqx.Module):
    cell: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, cell, key):
        self.cell = cell(16, 12, key=key)
        self.head = eqx.nn.Linear(12, 3, key=key)

    def __call__(self, x):
        zeros = jnp.zeros(12)
        start = (zeros, zeros) if isinstance(self.cell, eqx.nn.LSTMCell) else zeros
        end, _ = jax.lax.scan(lambda state, x: (self.cell(x, state), None), start, x)
        return self.head(end[0] if isinstance(end, tuple) else end)


def gru_equinox():
    return of_equinox(lambda key: RecurrentEquinox(eqx.nn.GRUCell, key), TOKENS)


def lstm_equinox():
    return of_equinox(lambda key: RecurrentEquinox(eqx.nn.LSTMCell, key), TOKENS)


def resnet_haiku():
    def function(x, is_training):
        model = hk.nets.ResNet(
            [1, 1, 1, 1],
            10,
            bottleneck=False,
            channels_per_group=[8, 8, 16, 16],
            use_projection=(True,) * 4,
        )
        return model(x, is_training=is_training)

    images = array(1, 16, 16, 3)
    model = hk.without_apply_rng(hk.transform_with_state(function))
    params, state = jax.eval_shape(partial(model.init, is_training=True), KEY, images)
    return lambda v, x: model.apply(*v, x, False)[0], (params, state), images


def attention_haiku():
    def function(x):
        norm = hk.LayerNorm(-1, create_scale=True, create_offset=True)
        init = hk.initializers.VarianceScaling()
        y = hk.MultiHeadAttention(4, 4, w_init=init, model_size=16)(*[norm(x)] * 3)
        x = x + y
        return x + hk.Linear(16)(jax.nn.gelu(hk.Linear(24)(x)))

    return of_haiku(function, TOKENS)


def lstm_haiku():
    def function(x):
        core = hk.LSTM(12)
        outs, _ = hk.dynamic_unroll(
            core, x, core.initial_state(x.shape[0]), time_major=False
        )
        return hk.Linear(3)(outs[:, -1])

    return of_haiku(function, TOKENS)


def scanned_functions():
    shapes = {
        "embedding": array(11, 16),
        "layers": {
            "up": array(3, 16, 24),
            "bias": array(3, 24),
            "down": array(3, 24, 16),
        },
    }

    def feed_forward(layer, x):
        return jax.nn.gelu(x @ layer["up"] + layer["bias"]) @ layer["down"]

    def apply(params, ids):
        def step(x, layer):
            return x + jax.checkpoint(feed_forward)(layer, x), None

        x, _ = jax.lax.scan(step, params["embedding"][ids], params["layers"])
        return x @ params["embedding"].T

    return apply, shapes, array(2, 5, dtype=jnp.int32)


def heads_by_vmap():
    shapes = {"into": array(5, 16, 4), "out": array(5, 4, 16)}

    def apply(params, x):
        def head(into, out):
            return jnp.tanh(x @ into) @ out

        return jax.vmap(head)(params["into"], params["out"]).sum(0)

    return apply, shapes, TOKENS


def mixture_of_experts():
    """The two best of four experts; their hidden units are shared groups."""
    shapes = {
        "router": array(16, 4),
        "up": array(4, 16, 12),
        "down": array(4, 12, 16),
    }

    def apply(params, x):
        scores = x @ params["router"]
        best, _ = jax.lax.top_k(scores, 2)
        gates = jax.nn.softmax(jnp.where(scores >= best[..., -1:], scores, -jnp.inf))
        hidden = jax.nn.relu(jnp.einsum("bti,eiu->bteu", x, params["up"]))
        return jnp.einsum("bteu,euo,bte->bto", hidden, params["down"], gates)

    return apply, shapes, TOKENS


RESHAPE = "reshape"
LINEN = "ScopeParamShapeError"
HAIKU = "retrieved shape"

# What a trace finds in each model: families, groups, and a word of the reason why the
# model's own function may not be called with smaller arrays; None if it may.
EXPECTED = {
    resnet_nnx: (6, 72, None),
    bottleneck_resnet_nnx: (9, 184, None),
    vgg_nnx: (3, 44, None),
    mobilenet_nnx: (6, 80, "feature_group_count"),
    densenet_nnx: (4, 26, None),
    unet_nnx: (6, 48, RESHAPE),
    shufflenet_nnx: (1, 12, None),
    attention_nnx: (4, 36, RESHAPE),
    heads_by_reshape_nnx: (4, 36, RESHAPE),
    units_by_reshape_nnx: (4, 36, RESHAPE),
    fused_attention_nnx: (3, 32, RESHAPE),
    vit_nnx: (7, 68, RESHAPE),
    bert_nnx: (9, 168, RESHAPE),
    decoder_nnx: (6, 46, RESHAPE),
    scan_nnx: (1, 24, None),
    cnn_linen: (3, 36, LINEN),
    attention_linen: (4, 36, LINEN),
    scan_linen: (1, 24, LINEN),
    convnext_linen: (2, 40, LINEN),
    lstm_linen: (1, 12, LINEN),
    mlp_equinox: (3, 48, None),
    cnn_equinox: (3, 24, None),
    attention_equinox: (3, 12, RESHAPE),
    gru_equinox: (1, 12, "contracting dimensions"),
    lstm_equinox: (1, 12, "contracting dimensions"),
    resnet_haiku: (9, 160, HAIKU),
    attention_haiku: (4, 36, HAIKU),
    lstm_haiku: (1, 12, HAIKU),
    scanned_functions: (2, 40, None),
    heads_by_vmap: (2, 9, None),
    mixture_of_experts: (1, 12, None),
}
