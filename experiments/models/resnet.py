"""Residual networks for small images (He et al., 2016, section 4.2), in Flax NNX."""

from collections.abc import Sequence
from functools import partial

import jax
from flax import nnx

he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")

Convolution = partial(nnx.Conv, use_bias=False, kernel_init=he_normal)
Normalization = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut, projected where shapes differ."""

    def __init__(self, inputs: int, width: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = Convolution(inputs, width, (3, 3), stride, padding=1, rngs=rngs)
        self.norm1 = Normalization(width, rngs=rngs)
        self.conv2 = Convolution(width, width, (3, 3), padding=1, rngs=rngs)
        self.norm2 = Normalization(width, rngs=rngs)
        self.projects = stride != 1 or inputs != width
        if self.projects:
            self.shortcut = Convolution(inputs, width, (1, 1), stride, rngs=rngs)
            self.shortcut_norm = Normalization(width, rngs=rngs)

    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., width)."""
        stored = not training
        y = nnx.relu(self.norm1(self.conv1(x), use_running_average=stored))
        y = self.norm2(self.conv2(y), use_running_average=stored)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), use_running_average=stored)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """A 3x3 stem, stages of basic blocks, a linear head.

    Every stage after the first halves the image. ResNet-20 is ``widths=(16, 32, 64)``
    and ``blocks=(3, 3, 3)``.

    Args:
      widths: channels of each stage.
      blocks: blocks of each stage.
      channels: channels of the images.
      classes: number of classes.
      patch: side of the squares of pixels that become channels before the stem; it has
        to divide the sides of the images.
      rngs: where the initial weights come from.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        channels: int,
        classes: int,
        *,
        patch: int = 1,
        rngs: nnx.Rngs,
    ):
        self.patch = patch
        channels *= patch**2
        self.stem = nnx.Dict(
            conv=Convolution(channels, widths[0], (3, 3), padding=1, rngs=rngs),
            norm=Normalization(widths[0], rngs=rngs),
        )
        # Named, not numbered: integer keys come back from checkpoints as strings.
        self.order = []
        inputs = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), 1):
            for index in range(1, count + 1):
                stride = 2 if stage > 1 and index == 1 else 1
                name = f"stage{stage}_block{index}"
                setattr(self, name, BasicBlock(inputs, width, stride, rngs))
                self.order.append(name)
                inputs = width
        self.order = tuple(self.order)
        self.head = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, training: bool) -> jax.Array:
        """Maps normalised images (batch, height, width, channels) to logits."""
        x = self.stem["conv"](space_to_depth(images, self.patch))
        x = nnx.relu(self.stem["norm"](x, use_running_average=not training))
        for name in self.order:
            x = getattr(self, name)(x, training=training)
        return self.head(x.mean(axis=(1, 2)))


def space_to_depth(images: jax.Array, patch: int) -> jax.Array:
    """Makes channels of squares of ``patch`` x ``patch`` pixels."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // patch, width // patch, patch**2 * channels)
