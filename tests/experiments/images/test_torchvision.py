"""Files of weights: what is read, what is refused and how."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import flax as safetensors_flax
from safetensors.numpy import load_file, save_file

from experiments.errors import ConfigError, WeightsError
from experiments.images.config import ModelConfig
from experiments.images.models import make_model
from experiments.images.resnet import Bottleneck, ResNet
from experiments.images.torchvision import (
    from_state_dict,
    load_torchvision,
    save_torchvision,
    state_dict,
    torch_name,
)
from experiments.weight_files import read_tensors

SOURCE = "x.pth as resnet"
NAMES = Path(__file__).parents[2] / "data" / "vision" / "names.json"


@pytest.fixture(scope="module")
def model():
    """Every kind of tensor, and few of them."""
    return nnx.eval_shape(
        lambda: ResNet((2, 3), (1, 1), 3, 5, block=Bottleneck, rngs=nnx.Rngs(0))
    )


@pytest.fixture(scope="module")
def tensors(model):
    """By torchvision's names, in its layout."""
    shapes = {4: (3, 2, 0, 1), 2: (1, 0)}
    generator = np.random.default_rng(0)
    return {
        torch_name(path): generator.normal(
            size=np.array(leaf.shape)[list(shapes.get(len(leaf.shape), (0,)))]
        ).astype(np.float32)
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    }


def test_the_names_are_those_of_torchvision(tensors):
    assert len(tensors) == 5 + 2 * (15 + 5) + 2
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv3.weight",
        "layer2.0.bn2.bias",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.running_var",
        "fc.bias",
    } <= set(tensors)


def test_tensors_go_where_they_belong(model, tensors):
    counters = {"bn1.num_batches_tracked": np.array(7)}
    params, batch_stats = from_state_dict(tensors | counters, model, SOURCE)
    block = params["stage2_block1"]
    np.testing.assert_array_equal(
        block["conv2"]["kernel"], tensors["layer2.0.conv2.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["fc.weight"].T)
    np.testing.assert_array_equal(
        batch_stats["stage2_block1"]["shortcut_norm"]["var"],
        tensors["layer2.0.downsample.1.running_var"],
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_what_is_written_has_torchvision_s_names_and_shapes(name):
    make = partial(make_model, ModelConfig(name=name), 3, 1000)
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    trees = [
        jax.tree.map(
            lambda leaf: np.broadcast_to(np.float32(0), leaf.shape),
            nnx.to_pure_dict(nnx.state(model, kind)),
        )
        for kind in (nnx.Param, nnx.BatchStat)
    ]
    shapes = {key: list(tensor.shape) for key, tensor in state_dict(*trees)}
    assert shapes == json.loads(NAMES.read_text())[name]


def test_what_is_written_is_read_again(model, tensors, tmp_path):
    path = tmp_path / "network.safetensors"
    save_torchvision(path, *from_state_dict(tensors, model, SOURCE))
    again = load_file(path)
    counters = {key for key in again if key.endswith("num_batches_tracked")}
    assert len(counters) == sum(key.endswith("running_var") for key in tensors)
    assert set(again) - counters == set(tensors)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer1.0.bn1.bias": None},
            r"1 tensors \(layer1.0.bn1.bias\) missing, 0 tensors unexpected$",
        ),
        (
            {f"layer3.{block}.conv1.weight": np.ones(1) for block in range(4)},
            r"0 tensors missing, 4 tensors \(layer3.0.conv1.weight, "
            r"layer3.1.conv1.weight, layer3.2.conv1.weight, \.\.\.\) unexpected$",
        ),
        (
            {"fc.weight": None, "fc.bias": None},
            r"2 tensors \(.*\) missing.*; classes= leaves the head out$",
        ),
        (
            {"conv1.weight": np.ones((2, 1, 3, 3))},
            r"conv1.weight has the shape \(2, 1, 3, 3\), expected \(2, 3, 3, 3\)$",
        ),
        (
            {"fc.weight": np.ones((7, 12))},
            r"fc.weight has the shape \(7, 12\), expected \(5, 12\); classes= leaves",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(model, tensors, change, message):
    changed = {key: v for key, v in (tensors | change).items() if v is not None}
    with pytest.raises(WeightsError, match=message) as caught:
        from_state_dict(changed, model, SOURCE)
    assert str(caught.value).startswith(SOURCE)


def test_a_file_of_another_network_is_recognised(tmp_path, resnet18):
    path = tmp_path / "weights.safetensors"
    save_file({key: np.zeros(1, np.float32) for key in resnet18}, path)
    with pytest.raises(WeightsError, match="; its names are those of resnet18$"):
        load_torchvision(path, "resnet50")


@pytest.fixture(scope="module")
def resnet18():
    """Zeros for ResNet-18, with a head of seven classes."""
    widths, blocks = (64, 128, 256, 512), (2, 2, 2, 2)
    model = nnx.eval_shape(
        lambda: ResNet(widths, blocks, 3, 7, imagenet_stem=True, rngs=nnx.Rngs(0))
    )
    order = {4: (3, 2, 0, 1), 2: (1, 0)}
    return {
        torch_name(path): np.zeros(
            [leaf.shape[axis] for axis in order.get(len(leaf.shape), (0,))], np.float16
        )
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    }


def test_another_number_of_classes_draws_a_new_head(tmp_path, resnet18):
    path = tmp_path / "weights.safetensors"
    save_file(resnet18, path)
    with pytest.raises(WeightsError, match=r"expected \(1000.*classes= leaves"):
        load_torchvision(path, "resnet18")
    params, batch_stats = load_torchvision(path, "resnet18", classes=10)
    other, _ = load_torchvision(path, "resnet18", classes=10, seed=1)
    path.unlink()
    assert params["head"]["kernel"].shape == (512, 10)
    assert 0 < jnp.abs(params["head"]["kernel"]).max() <= 512**-0.5
    assert (params["head"]["kernel"] != other["head"]["kernel"]).any()
    assert not params["stem"]["conv"]["kernel"].any()
    for leaf in jax.tree.leaves((params, batch_stats)):
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_safetensors_come_back_whatever_their_dtype(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    written = jnp.arange(6, dtype=dtype).reshape(2, 3) / 4
    safetensors_flax.save_file({"fc.weight": written}, path)
    np.testing.assert_array_equal(read_tensors(path)["fc.weight"], written)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", None, "there is no file .*x.safetensors"),
        ("x.safetensors", b"no", "x.safetensors cannot be read as safetensors: "),
        ("x.h5", b"no", "x.h5 must be a .safetensors, .pth, .pt or .bin file"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_torchvision(tmp_path / name, "resnet18")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet20",), "name must be one of resnet18, resnet34, resnet50, got 'res"),
        (("resnet18", 0), "classes must be at least 1, got 0"),
    ],
)
def test_what_is_asked_for_is_checked_first(arguments, message):
    name, *classes = arguments
    with pytest.raises(ConfigError, match=message):
        load_torchvision("x.pth", name, classes=classes[0] if classes else None)


def test_without_pytorch_a_pickle_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_bytes(b"no")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="install torch, or convert it where torch"):
        read_tensors(path)


def test_a_pickle_is_read_by_pytorch(tmp_path, model, tensors):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    counters = {"bn1.num_batches_tracked": torch.tensor(7)}
    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    torch.save(state | counters, path)
    ours = from_state_dict(read_tensors(path), model, SOURCE)
    expected = from_state_dict(tensors, model, SOURCE)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    for content, message in (
        ([torch.ones(1)], "holds a list, not a state dict"),
        ({"epoch": 3}, "is not a state dict: its 'epoch' is a int"),
        ({"model": jnp.ones(1)}, "PyTorch cannot read"),
    ):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=message):
            read_tensors(path)
