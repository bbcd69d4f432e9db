"""Layers as in the authors' PyTorch models."""

from functools import partial
from typing import Any

import jax
from flax import nnx

he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default for convolutions and linear layers: within 1 / sqrt(fan in) of 0.
torch_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

Convolution = partial(nnx.Conv, use_bias=False)


class Normalization(nnx.BatchNorm):
    """Batch norm in the precision of its statistics, whatever its input's."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        super().__init__(width, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(  # type: ignore[override]
        self, x: jax.Array, *, training: bool
    ) -> jax.Array:
        """Normalises by the batch in training, by the stored statistics otherwise."""
        # A dtype of its own would round the stored statistics to it in evaluation.
        return super().__call__(x, use_running_average=not training).astype(x.dtype)


def torch_linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer with the initial weights and biases of PyTorch."""
    layer = nnx.Linear(inputs, outputs, kernel_init=torch_uniform, rngs=rngs)
    bound = inputs**-0.5
    # Not by bias_init: a closure for each layer would make equal models unequal.
    bias: Any = layer.bias
    bias[...] = jax.random.uniform(rngs.params(), (outputs,), bias.dtype, -bound, bound)
    return layer
