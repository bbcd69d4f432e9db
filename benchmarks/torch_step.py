"""CrAM+ in PyTorch, as the paper states it, against ours: step and projection.

    pip install torch            # then
    python -m benchmarks.torch_step

PyTorch's projection concatenates all magnitudes, asks torch.topk for the k largest and
compares with the smallest of them. The two frameworks' convolutions differ in speed, so
compare each one's CrAM+ step with its own SGD step. Target: our projection of 85
million weights at least 4 times faster.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import nn

import cram_jax
from benchmarks import timing
from benchmarks.step import compile_step, sgd
from benchmarks.workloads import WORKLOADS

SPARSITY = 0.9
RHO = 0.05
# Layers and widths of BERT encoders of 25 and 85 million weights.
ENCODERS = ((8, 512), (12, 768))


class BasicBlock(nn.Module):
    """As `experiments.images.resnet.BasicBlock`."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (batch, inputs, height, width) to (batch, width, ...)."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def torch_resnet20() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    inputs = 16
    for width in (16, 32, 64):
        for index in range(3):
            stride = 2 if width > 16 and index == 0 else 1
            layers.append(BasicBlock(inputs, width, stride))
            inputs = width
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *pool)


@torch.no_grad()
def torch_project(weights: Sequence[torch.Tensor], sparsity: float) -> list[Any]:
    """Sets the smallest weights to zero, in place; returns the masks."""
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    k = magnitudes.numel() - int(sparsity * magnitudes.numel())
    threshold = torch.topk(magnitudes, k, sorted=False).values.min()
    masks = [weight.abs() >= threshold for weight in weights]
    for weight, mask in zip(weights, masks, strict=True):
        weight.mul_(mask)
    return masks


def torch_steps(batch: int) -> dict[str, Callable[[], Any]]:
    """A step of SGD and one of CrAM+ with sparse gradients, eager as users run it."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch) % 10

    def make(*, cram: bool) -> Callable[[], Any]:
        model = torch_resnet20().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        params = list(model.parameters())
        prunable = [p for p in params if p.dim() > 1]

        def gradients() -> list[torch.Tensor]:
            loss = nn.functional.cross_entropy(model(images), labels)
            return list(torch.autograd.grad(loss, params))

        def step() -> None:
            grads = gradients()
            if cram:
                with torch.no_grad():
                    saved = [p.clone() for p in params]
                    for param, grad in zip(params, grads, strict=True):
                        param.add_(grad, alpha=RHO)
                masks = iter(torch_project(prunable, SPARSITY))
                extra = gradients()
                with torch.no_grad():
                    for index, param in enumerate(params):
                        if param.dim() > 1:
                            extra[index].mul_(next(masks))
                        param.copy_(saved[index])
                        grads[index].add_(extra[index])
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()

        return step

    return {"torch SGD": make(cram=False), "torch CrAM+": make(cram=True)}


def steps(repeats: int) -> None:
    """Prints the steps of both frameworks on ResNet-20."""
    workload = next(iter(WORKLOADS.values()))()
    rule = cram_jax.cram_plus(
        workload.loss_fn, cram_jax.top_k(SPARSITY), RHO, has_aux=True
    )
    functions: dict[str, Callable[[], Any]] = {
        "cram_jax SGD": compile_step(workload, sgd()).run,
        "cram_jax CrAM+": compile_step(workload, optax.chain(rule, sgd())).run,
    }
    seconds = timing.interleaved(functions | torch_steps(batch=128), repeats)
    print("\nResNet-20, batch 128; times SGD of the same framework")
    for name, times in seconds.items():
        own = seconds[f"{name.split()[0]} SGD"]
        print(timing.row(name, times, own), flush=True)


def projections(repeats: int) -> None:
    """Prints the projections of both frameworks, from weights to weights and masks."""
    for layers, width in ENCODERS:
        generator = np.random.default_rng(0)
        shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
        arrays = [
            generator.standard_normal(shape, dtype=np.float32)
            for _ in range(layers)
            for shape in shapes
        ]
        params = [jnp.asarray(array) for array in arrays]
        tensors = [torch.from_numpy(array) for array in arrays]
        project = jax.jit(lambda p: cram_jax.compress(p, cram_jax.top_k(SPARSITY)))
        functions = {
            "cram_jax": lambda project=project, params=params: project(params),
            # Into copies, as ours does not change its arguments either.
            "torch": lambda tensors=tensors: torch_project(
                [tensor.clone() for tensor in tensors], SPARSITY
            ),
        }
        seconds = timing.interleaved(functions, repeats)
        print(f"\nprojection of {sum(a.size for a in arrays):,} weights; times ours")
        for framework, times in seconds.items():
            print(timing.row(framework, times, seconds["cram_jax"]), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, and runs both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    print(timing.machine())
    projections(options.repeats)
    steps(options.repeats)


if __name__ == "__main__":
    main()
