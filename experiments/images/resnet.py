"""Residual networks (He et al., 2016) for small and for large images, in Flax NNX."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.images.layers import Convolution, Normalization, he_normal

MakeConvolution = Callable[..., nnx.Conv]


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut, projected where shapes differ."""

    expansion = 1

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        convolution: MakeConvolution,
        rngs: nnx.Rngs,
    ):
        self.conv1 = convolution(inputs, width, (3, 3), stride, padding=1, rngs=rngs)
        self.norm1 = Normalization(width, rngs)
        self.conv2 = convolution(width, width, (3, 3), padding=1, rngs=rngs)
        self.norm2 = Normalization(width, rngs)
        self.projects = stride != 1 or inputs != width
        if self.projects:
            self.shortcut = convolution(inputs, width, (1, 1), stride, rngs=rngs)
            self.shortcut_norm = Normalization(width, rngs)

    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., width)."""
        y = nnx.relu(self.norm1(self.conv1(x), training=training))
        y = self.norm2(self.conv2(y), training=training)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), training=training)
        return nnx.relu(x + y)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, and a shortcut as in `BasicBlock`.

    The 3x3 convolution has the stride, as in torchvision ("version 1.5"); in the paper
    the first one has it.
    """

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        convolution: MakeConvolution,
        rngs: nnx.Rngs,
    ):
        outputs = self.expansion * width
        self.conv1 = convolution(inputs, width, (1, 1), rngs=rngs)
        self.norm1 = Normalization(width, rngs)
        self.conv2 = convolution(width, width, (3, 3), stride, padding=1, rngs=rngs)
        self.norm2 = Normalization(width, rngs)
        self.conv3 = convolution(width, outputs, (1, 1), rngs=rngs)
        self.norm3 = Normalization(outputs, rngs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = convolution(inputs, outputs, (1, 1), stride, rngs=rngs)
            self.shortcut_norm = Normalization(outputs, rngs)

    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., 4 * width)."""
        y = nnx.relu(self.norm1(self.conv1(x), training=training))
        y = nnx.relu(self.norm2(self.conv2(y), training=training))
        y = self.norm3(self.conv3(y), training=training)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), training=training)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """A stem, stages of residual blocks, a linear head.

    Every stage after the first halves the image. ResNet-20 is ``widths=(16, 32, 64)``
    and ``blocks=(3, 3, 3)``; see `make_model` for others by name.

    Args:
      widths: channels of each stage, of its 3x3 convolutions.
      blocks: blocks of each stage.
      channels: channels of the images.
      classes: number of classes.
      block: `BasicBlock` or `Bottleneck`.
      imagenet_stem: a 7x7 convolution and a max-pool, which together make the image
        four times smaller, in place of a 3x3 convolution.
      patch: side of the squares of pixels that become channels before the stem; it has
        to divide the sides of the images.
      kernel_init: initial weights of the convolutions.
      head: makes the head of its inputs, its outputs and rngs.
      dtype: of the convolutions and what lies between them, such as bfloat16; by
        default that of images and parameters. Parameters and statistics are float32.
      rngs: where the initial weights come from.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        channels: int,
        classes: int,
        *,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        imagenet_stem: bool = False,
        patch: int = 1,
        kernel_init: nnx.Initializer = he_normal,
        head: Callable[..., nnx.Linear] = nnx.Linear,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.patch = patch
        self.pools = imagenet_stem
        convolution = partial(Convolution, kernel_init=kernel_init, dtype=dtype)
        size, stride, padding = (7, 2, 3) if imagenet_stem else (3, 1, 1)
        self.stem = nnx.Dict(
            conv=convolution(
                channels * patch**2,
                widths[0],
                (size, size),
                stride,
                padding=padding,
                rngs=rngs,
            ),
            norm=Normalization(widths[0], rngs),
        )
        # Named, not numbered: integer keys come back from checkpoints as strings.
        order = []
        inputs = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), 1):
            for index in range(1, count + 1):
                stride = 2 if stage > 1 and index == 1 else 1
                name = f"stage{stage}_block{index}"
                setattr(self, name, block(inputs, width, stride, convolution, rngs))
                order.append(name)
                inputs = block.expansion * width
        self.order = tuple(order)
        self.head = head(inputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, training: bool) -> jax.Array:
        """Maps normalised images (batch, height, width, channels) to logits."""
        x = self.stem["conv"](space_to_depth(images, self.patch))
        x = nnx.relu(self.stem["norm"](x, training=training))
        if self.pools:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=[(1, 1), (1, 1)])
        for name in self.order:
            x = getattr(self, name)(x, training=training)
        # The head is never narrower than its parameters.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self.head(x.mean(axis=(1, 2)))


def space_to_depth(images: jax.Array, patch: int) -> jax.Array:
    """Makes channels of squares of ``patch`` x ``patch`` pixels."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // patch, width // patch, patch**2 * channels)
