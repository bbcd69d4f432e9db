"""Records the logits of PyTorch's networks; run by hand where PyTorch is.

    python -m tests.data.vision.record

It needs only torch and numpy. The networks are written out here once more, with the
tensor names of torchvision (ResNet-18, 34, 50) and of the authors' code for CIFAR;
their weights are those of tests/torch_weights.py. Logits are computed in float64;
beside them stands how far PyTorch's own float32 is from them: training mode with few
images amplifies rounding, most of all in ResNet-50.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tests.torch_weights import fill, images


def conv(inputs, outputs, size, stride=1, bias=False):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)


class Block(nn.Module):
    """A basic block, or a bottleneck if there are more outputs than the width."""

    def __init__(self, inputs, width, outputs, stride, shortcut):
        super().__init__()
        sizes = [3, 3] if outputs == width else [1, 3, 1]
        widths = [inputs] + [width] * (len(sizes) - 1) + [outputs]
        self.depth, self.shortcut_name = len(sizes), shortcut
        # The first 3x3 convolution has the stride.
        strided = sizes.index(3)
        for index, size in enumerate(sizes):
            step = stride if index == strided else 1
            convolution = conv(widths[index], widths[index + 1], size, step)
            setattr(self, f"conv{index + 1}", convolution)
            setattr(self, f"bn{index + 1}", nn.BatchNorm2d(widths[index + 1]))
        if stride > 1 or inputs != outputs:
            projection = [conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)]
            setattr(self, shortcut, nn.Sequential(*projection))

    def forward(self, x):
        y = x
        for index in range(1, self.depth + 1):
            y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            if index < self.depth:
                y = y.relu()
        if hasattr(self, self.shortcut_name):
            x = getattr(self, self.shortcut_name)(x)
        return (x + y).relu()


class ResNet(nn.Module):
    def __init__(
        self,
        widths,
        blocks,
        classes,
        *,
        expansion=1,
        large=False,
        shortcut="downsample",
        head="fc",
    ):
        super().__init__()
        self.large, self.stages, self.head_name = large, len(widths), head
        self.conv1 = conv(3, widths[0], 7, 2) if large else conv(3, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layer = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                outputs = expansion * width
                layer.append(Block(inputs, width, outputs, stride, shortcut))
                inputs = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        setattr(self, head, nn.Linear(inputs, classes))

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        if self.large:
            x = functional.max_pool2d(x, 3, 2, 1)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return getattr(self, self.head_name)(x.mean((2, 3)))


class VGG(nn.Module):
    def __init__(self, classes):
        super().__init__()
        layers, inputs = [], 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += [conv(inputs, width, 3, bias=True), nn.BatchNorm2d(width)]
                layers.append(nn.ReLU())
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


SMALL, LARGE = (16, 32, 64), (64, 128, 256, 512)
# The sides of the images, and what makes the network.
MODELS = {
    "resnet20": (16, lambda: ResNet(SMALL, (3, 3, 3), 10)),
    "resnet56": (16, lambda: ResNet(SMALL, (9, 9, 9), 10)),
    "resnet18_cifar": (
        16,
        lambda: ResNet(LARGE, (2, 2, 2, 2), 10, shortcut="shortcut", head="classifier"),
    ),
    "vgg16_bn_cifar": (32, lambda: VGG(10)),
    "resnet18": (64, lambda: ResNet(LARGE, (2, 2, 2, 2), 1000, large=True)),
    "resnet34": (64, lambda: ResNet(LARGE, (3, 4, 6, 3), 1000, large=True)),
    "resnet50": (
        64,
        lambda: ResNet(LARGE, (3, 4, 6, 3), 1000, large=True, expansion=4),
    ),
}


def load(make):
    """The network with the weights of the rule."""
    model = make()
    state = {
        name: torch.from_numpy(fill(name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    model.load_state_dict(state, strict=False)
    return model


@torch.no_grad()
def record(name, side, make):
    """Arrays by name: logits and rounding in both modes, the number of parameters."""
    single, x = load(make), torch.from_numpy(images(side))
    double = load(make).double()
    numbers = [parameter.numel() for parameter in single.parameters()]
    arrays = {f"{name}/parameters": sum(numbers)}
    for mode in ("evaluation", "training"):
        training = mode == "training"
        logits = double.train(training)(x.double())
        rounding = (single.train(training)(x) - logits).abs().max()
        arrays[f"{name}/{mode}"] = logits.numpy().astype(np.float32)
        arrays[f"{name}/{mode}_rounding"] = float(rounding)
        largest = float(logits.abs().max())
        print(f"{name}, {mode}: largest logit {largest:.3g}, rounding {rounding:.1e}")
    return arrays


def main():
    arrays = {}
    for name, (side, make) in MODELS.items():
        arrays |= record(name, side, make)
    path = Path(__file__).with_name("logits.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
