"""Networks in Flax Linen."""

import flax.linen as nn
import jax
from structure.models.shapes import IMAGES, KEY, TOKENS


def of_linen(module, *inputs):
    variables = jax.eval_shape(module.init, KEY, *inputs)
    return lambda variables, *x: module.apply(variables, *x), variables, *inputs


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
