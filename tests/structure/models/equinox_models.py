"""Networks in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
from structure.models.shapes import KEY, TOKENS, array


def of_equinox(make, *inputs):
    model = eqx.filter_eval_shape(make, KEY)
    arrays, static = eqx.partition(model, lambda leaf: hasattr(leaf, "shape"))
    return (
        lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x),
        arrays,
        *inputs,
    )


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
