"""Networks in Haiku."""

from functools import partial

import haiku as hk
import jax
from structure.models.shapes import KEY, TOKENS, array


def of_haiku(function, *inputs):
    model = hk.without_apply_rng(hk.transform_with_state(function))
    variables = jax.eval_shape(model.init, KEY, *inputs)
    return lambda v, *x: model.apply(v[0], v[1], *x)[0], variables, *inputs


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
