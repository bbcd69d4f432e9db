"""The networks against PyTorch's: logits of equal weights, recorded in float64.

`tests/data/vision/record.py` made the recordings; weights and images are those of
`tests/torch_weights.py`, under the tensor names of torchvision and the authors' code.
"""

import functools
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from torch_weights import fill, images

from experiments.images.config import ModelConfig
from experiments.images.models import make_model
from experiments.images.torchvision import from_state_dict, load_torchvision, torch_name

pytestmark = pytest.mark.usefixtures("quick_compilation")
RECORDED = Path(__file__).parents[2] / "data" / "vision" / "logits.npz"
SMALL = ["resnet20", "resnet56", "resnet18_cifar"]
LARGE = ["resnet18", "resnet34", "resnet50"]


# As another one, but deeper.
DEEPER = {"resnet56": pytest.mark.nightly, "resnet34": pytest.mark.nightly}


def each(names):
    return [pytest.param(name, marks=DEEPER.get(name, ())) for name in names]


@functools.cache
def abstract(name):
    classes = 1000 if name in LARGE else 10
    config = ModelConfig(name=name)
    return nnx.eval_shape(lambda: make_model(config, 3, classes, nnx.Rngs(0)))


def pure(model):
    kinds = (nnx.Param, nnx.BatchStat)
    return tuple(nnx.to_pure_dict(nnx.state(model, kind)) for kind in kinds)


def torch_shape(leaf):
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(leaf.shape), (0,))
    return tuple(leaf.shape[axis] for axis in order)


def authors(name):
    """The authors' name for a tensor of their ResNet-18 for CIFAR."""
    return name.replace("downsample", "shortcut").replace("fc.", "classifier.")


def state_dict(model, rename=lambda name: name):
    leaves = jax.tree.leaves_with_path(pure(model))
    names = {torch_name(path): torch_shape(leaf) for path, leaf in leaves}
    return {name: fill(rename(name), shape) for name, shape in names.items()}


def vgg_weights(model):
    """PyTorch numbers the layers; its convolutions have biases, which ours fold in."""
    trees = pure(model)
    params, batch_stats = trees
    index = 0
    for stage, count in enumerate(model.convolutions, 1):
        for layer in range(1, count + 1):
            conv, norm = f"conv{stage}_{layer}", f"norm{stage}_{layer}"
            kernel = params[conv]["kernel"]
            weight = fill(f"features.{index}.weight", torch_shape(kernel))
            params[conv]["kernel"] = weight.transpose(2, 3, 1, 0)
            width = kernel.shape[-1:]
            bias = fill(f"features.{index}.bias", width)
            name = f"features.{index + 1}"
            params[norm]["scale"] = fill(f"{name}.weight", width)
            params[norm]["bias"] = fill(f"{name}.bias", width)
            mean = fill(f"{name}.running_mean", width) - bias
            variance = fill(f"{name}.running_var", width)
            batch_stats[norm] = {"mean": mean, "var": variance}
            index += 3
        index += 1
    params["head"]["kernel"] = fill("classifier.weight", (10, 512)).T
    params["head"]["bias"] = fill("classifier.bias", (10,))
    return params, batch_stats


def assert_logits(name, model, params, batch_stats, side):
    graph = nnx.graphdef(model)

    @jax.jit
    def both(params, batch_stats, x):
        model = nnx.merge(graph, params, batch_stats, copy=True)
        return model(x, training=False), model(x, training=True)

    x = images(side).transpose(0, 2, 3, 1)
    recorded = np.load(RECORDED)
    for mode, logits in zip(
        ("evaluation", "training"), both(params, batch_stats, x), strict=True
    ):
        expected = recorded[f"{name}/{mode}"]
        # Where PyTorch's own float32 is further off, ours may be, too.
        tolerance = max(1e-4, 3 * recorded[f"{name}/{mode}_rounding"])
        np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", each(SMALL))
def test_small_resnets_give_the_logits_of_pytorch(name):
    model = abstract(name)
    rename = authors if name == "resnet18_cifar" else lambda name: name
    weights = from_state_dict(state_dict(model, rename), model, name)
    assert_logits(name, model, *weights, side=16)


def test_vgg_gives_the_logits_of_pytorch():
    model = abstract("vgg16_bn_cifar")
    assert_logits("vgg16_bn_cifar", model, *vgg_weights(model), side=32)


@pytest.mark.parametrize("name", each(LARGE))
def test_files_of_torchvision_give_the_logits_of_pytorch(name, tmp_path):
    model = abstract(name)
    path = tmp_path / f"{name}.safetensors"
    save_file(state_dict(model), path)
    weights = load_torchvision(path, name)
    path.unlink()  # pytest would keep it, and it is large
    assert_logits(name, model, *weights, side=64)


@pytest.mark.parametrize("name", [*SMALL, "vgg16_bn_cifar", *LARGE])
def test_networks_have_as_many_parameters_as_those_of_pytorch(name):
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(pure(abstract(name))[0])]
    biases = sum(2 * [64] + 2 * [128] + 3 * [256] + 6 * [512])
    unused = biases if name == "vgg16_bn_cifar" else 0
    assert sum(sizes) + unused == np.load(RECORDED)[f"{name}/parameters"]
