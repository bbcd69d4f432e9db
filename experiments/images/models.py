"""Flax NNX models, by name."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from experiments.errors import ConfigError
from experiments.images.config import ModelConfig
from experiments.images.layers import torch_linear, torch_uniform
from experiments.images.own import own_model
from experiments.images.resnet import BasicBlock, Bottleneck, ResNet
from experiments.images.vgg import VGG

# Blocks of each of the three stages.
CIFAR_RESNETS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}

IMAGENET_RESNETS: dict[str, Any] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}

IMAGENET_WIDTHS = (64, 128, 256, 512)


def make_model(
    config: ModelConfig, channels: int, classes: int, rngs: nnx.Rngs
) -> nnx.Module:
    """The network of a configuration.

    Initial weights are those of the PyTorch code that the paper's runs were made with:
    normal with standard deviation sqrt(2 / fan out) for the convolutions of
    ResNet-20 to 56 and of the networks for ImageNet, PyTorch's defaults for
    ResNet-18 and VGG-16 for CIFAR, and for all heads. Only ``name="resnet"``, the
    network of our own small runs, has a head with the initial weights of Flax.

    Args:
      config: the name of the network, and what goes with it.
      channels: channels of the images.
      classes: number of classes.
      rngs: where the initial weights come from.

    Returns:
      The network: called with normalised images (batch, height, width, channels) and
      ``training=``, it returns float32 logits (batch, classes).
    """
    if config.module:
        return own_model(config.module, channels, classes, rngs)
    dtype = jnp.dtype(config.dtype)
    widths = config.layer_widths or None
    if config.name == "vgg16_bn_cifar":
        return VGG(channels, classes, layer_widths=widths, dtype=dtype, rngs=rngs)
    build = partial(
        ResNet,
        channels=channels,
        classes=classes,
        layer_widths=widths,
        patch=config.patch,
        dtype=dtype,
        rngs=rngs,
    )
    if config.name == "resnet":
        return build(config.widths, config.blocks)
    if config.name == "resnet18_cifar":
        return build(
            IMAGENET_WIDTHS, (2, 2, 2, 2), kernel_init=torch_uniform, head=torch_linear
        )
    if config.name in CIFAR_RESNETS:
        count = CIFAR_RESNETS[config.name]
        return build((16, 32, 64), (count,) * 3, head=torch_linear)
    block, blocks = IMAGENET_RESNETS[config.name]
    return build(
        IMAGENET_WIDTHS, blocks, block=block, imagenet_stem=True, head=torch_linear
    )


def read_layer_widths(shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """The ``layer_widths`` of a network, from the shapes of its parameters by path."""
    kernels = [path for path in shapes if re.search(r"conv[\d_]*/kernel$", path)]

    def place(path: str) -> list[int]:
        """A sort key: the stem has no number, and layer 10 comes after layer 9."""
        return [int(number) for number in re.findall(r"\d+", path)]

    return tuple(shapes[path][-1] for path in sorted(kernels, key=place))


def check_images(config: ModelConfig, size: tuple[int, int]) -> None:
    """Raises if images of a size (height, width) do not suit a network.

    Raises:
      ConfigError: the patch does not divide them, or they are too small for VGG.
    """
    if any(side % config.patch for side in size):
        raise ConfigError(
            f"patch must divide the sides of {size} images, got {config.patch}"
        )
    if config.name == "vgg16_bn_cifar" and min(size) < 32:
        raise ConfigError(f"{config.name} needs images of 32x32 or larger, got {size}")
