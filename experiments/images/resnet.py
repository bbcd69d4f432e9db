"""Residual networks (He et al., 2016) for small and for large images, in Flax NNX."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.errors import ConfigError
from experiments.images.layers import Convolution, Normalization, he_normal

MakeConvolution = Callable[..., nnx.Conv]


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut, projected at the start of a stage.

    Args:
      inputs: incoming channels.
      widths: channels of each convolution; the last are also those of the shortcut.
      stride: of the first convolution.
      projects: whether the shortcut is a convolution.
      convolution: makes one.
      rngs: where the initial weights come from.
    """

    expansions = (1, 1)

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        stride: int,
        projects: bool,
        convolution: MakeConvolution,
        rngs: nnx.Rngs,
    ):
        inner, outputs = widths
        self.conv1 = convolution(inputs, inner, (3, 3), stride, padding=1, rngs=rngs)
        self.norm1 = Normalization(inner, rngs)
        self.conv2 = convolution(inner, outputs, (3, 3), padding=1, rngs=rngs)
        self.norm2 = Normalization(outputs, rngs)
        self.projects = projects
        if self.projects:
            self.shortcut = convolution(inputs, outputs, (1, 1), stride, rngs=rngs)
            self.shortcut_norm = Normalization(outputs, rngs)

    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., outputs)."""
        y = nnx.relu(self.norm1(self.conv1(x), training=training))
        y = self.norm2(self.conv2(y), training=training)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), training=training)
        return nnx.relu(x + y)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, and a shortcut; arguments as for `BasicBlock`.

    The 3x3 convolution has the stride, as in torchvision ("version 1.5"); in the paper
    the first one has it.
    """

    expansions = (1, 1, 4)

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        stride: int,
        projects: bool,
        convolution: MakeConvolution,
        rngs: nnx.Rngs,
    ):
        first, second, outputs = widths
        self.conv1 = convolution(inputs, first, (1, 1), rngs=rngs)
        self.norm1 = Normalization(first, rngs)
        self.conv2 = convolution(first, second, (3, 3), stride, padding=1, rngs=rngs)
        self.norm2 = Normalization(second, rngs)
        self.conv3 = convolution(second, outputs, (1, 1), rngs=rngs)
        self.norm3 = Normalization(outputs, rngs)
        self.projects = projects
        if self.projects:
            self.shortcut = convolution(inputs, outputs, (1, 1), stride, rngs=rngs)
            self.shortcut_norm = Normalization(outputs, rngs)

    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., outputs)."""
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
      layer_widths: channels of the stem and of each convolution of each block, if they
        are not those of the stage; the blocks of a stage end with the same number.
      imagenet_stem: a 7x7 convolution and a max-pool, which together make the image
        four times smaller, instead of a 3x3 convolution.
      patch: side of the squares of pixels that become channels before the stem; it has
        to divide the sides of the images.
      kernel_init: initial weights of the convolutions.
      head: makes the head of its inputs, its outputs and rngs.
      dtype: of the convolutions and everything between them, such as bfloat16; by
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
        layer_widths: Sequence[int] | None = None,
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
        layers = _layer_widths(widths, blocks, block.expansions, layer_widths)
        inputs = next(layers)[0]
        size, stride, padding = (7, 2, 3) if imagenet_stem else (3, 1, 1)
        self.stem = nnx.Dict(
            conv=convolution(
                channels * patch**2,
                inputs,
                (size, size),
                stride,
                padding=padding,
                rngs=rngs,
            ),
            norm=Normalization(inputs, rngs),
        )
        # Named, not numbered: integer keys come back from checkpoints as strings.
        order = []
        for stage, count in enumerate(blocks, 1):
            for index in range(1, count + 1):
                own = next(layers)
                stride = 2 if stage > 1 and index == 1 else 1
                projects = index == 1 and (stage > 1 or block is Bottleneck)
                if not projects and own[-1] != inputs:
                    raise ConfigError(
                        f"layer_widths must be the same where blocks of a stage are "
                        f"added, got {inputs} and {own[-1]} in stage {stage}"
                    )
                name = f"stage{stage}_block{index}"
                made = block(inputs, own, stride, projects, convolution, rngs)
                setattr(self, name, made)
                order.append(name)
                inputs = own[-1]
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
        # The head never computes in a narrower dtype than its parameters.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self.head(x.mean(axis=(1, 2)))


def _layer_widths(
    widths: Sequence[int],
    blocks: Sequence[int],
    expansions: Sequence[int],
    given: Sequence[int] | None,
) -> Iterator[tuple[int, ...]]:
    """Widths of the stem, then of each block, as given or as its stage says."""
    parts = [(widths[0],)] + [
        tuple(expansion * width for expansion in expansions)
        for width, count in zip(widths, blocks, strict=True)
        for _ in range(count)
    ]
    count = sum(map(len, parts))
    if given is not None and len(given) != count:
        raise ConfigError(
            f"layer_widths must be those of {count} convolutions, got {len(given)}"
        )
    remaining = iter(itertools.chain(*parts) if given is None else given)
    return iter([tuple(itertools.islice(remaining, len(part))) for part in parts])


def space_to_depth(images: jax.Array, patch: int) -> jax.Array:
    """Turns squares of ``patch`` x ``patch`` pixels into channels."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // patch, width // patch, patch**2 * channels)
