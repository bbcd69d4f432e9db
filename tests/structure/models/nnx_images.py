"""Networks on images in Flax NNX."""

import jax.numpy as jnp
from flax import nnx
from structure.models.shapes import IMAGES, array

from experiments.images.resnet import Bottleneck, ResNet


def of_nnx(make, *inputs, **options):
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return lambda state, *x: nnx.merge(graph, state)(*x, **options), state, *inputs


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
