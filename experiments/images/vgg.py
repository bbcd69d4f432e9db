"""VGG-16 with batch norm for small images (Simonyan & Zisserman, 2015), in Flax NNX."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.errors import ConfigError
from experiments.images.layers import (
    Convolution,
    Normalization,
    torch_linear,
    torch_uniform,
)


class VGG(nnx.Module):
    """Stages of 3x3 convolutions, each stage with a max-pool; one linear layer.

    The variant for CIFAR that the authors of CrAM use: batch norm after every
    convolution, and one linear layer instead of three. Their convolutions have biases;
    ours have none, because batch norm would subtract them again.

    Args:
      channels: channels of the images.
      classes: number of classes.
      widths: channels of each stage, by default those of VGG-16.
      convolutions: convolutions of each stage, by default those of VGG-16.
      layer_widths: channels of each convolution, if not the same in a whole stage.
      dtype: as for `experiments.images.resnet.ResNet`.
      rngs: where the initial weights come from.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512, 512),
        convolutions: tuple[int, ...] = (2, 2, 3, 3, 3),
        layer_widths: tuple[int, ...] | None = None,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.convolutions = convolutions
        if layer_widths is None:
            layer_widths = tuple(np.repeat(widths, convolutions).tolist())
        if len(layer_widths) != sum(convolutions):
            raise ConfigError(
                f"layer_widths must be those of {sum(convolutions)} convolutions, got "
                f"{len(layer_widths)}"
            )
        remaining = iter(layer_widths)
        for stage, count in enumerate(convolutions):
            for index in range(count):
                width = next(remaining)
                convolution = Convolution(
                    channels,
                    width,
                    (3, 3),
                    padding=1,
                    kernel_init=torch_uniform,
                    dtype=dtype,
                    rngs=rngs,
                )
                name = f"{stage + 1}_{index + 1}"
                setattr(self, f"conv{name}", convolution)
                setattr(self, f"norm{name}", Normalization(width, rngs))
                channels = width
        self.head = torch_linear(channels, classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, training: bool) -> jax.Array:
        """Maps normalised images (batch, height, width, channels) to logits.

        Height and width are at least 32 for the five pools of VGG-16.
        """
        x = images
        for stage, count in enumerate(self.convolutions, 1):
            for index in range(1, count + 1):
                x = getattr(self, f"conv{stage}_{index}")(x)
                norm = getattr(self, f"norm{stage}_{index}")
                x = nnx.relu(norm(x, training=training))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self.head(x.mean(axis=(1, 2)))
