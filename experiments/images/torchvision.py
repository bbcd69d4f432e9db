"""Weights of torchvision's ResNets, from its files to our trees and back."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cram_jax.safetensors import Writer
from experiments.errors import ConfigError, WeightsError
from experiments.images.config import ModelConfig
from experiments.images.layers import torch_linear
from experiments.images.models import IMAGENET_RESNETS, make_model
from experiments.images.resnet import ResNet
from experiments.runs.stored_config import read_fields
from experiments.weight_files import read_tensors

# From (height, width, in, out) and (in, out) to PyTorch's layout, by rank.
ORDERS = {4: (3, 2, 0, 1), 2: (1, 0)}
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def load_torchvision(
    path: str | Path, name: str, *, classes: int | None = None, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a state dict of torchvision's ResNet-18, 34 or 50.

    A ``.safetensors`` file is read directly; a ``.pth`` or ``.pt`` file, which is a
    pickle, by PyTorch, which has to be installed. For images of ImageNet normalised as
    torchvision does, the logits are torchvision's.

    Args:
      path: the file.
      name: resnet18, resnet34 or resnet50.
      classes: discards the file's head, and draws a new one with this many classes; by
        default the file's, with 1000 classes.
      seed: of the new head.

    Returns:
      params and batch_stats of ``make_model(ModelConfig(name=name), 3, classes, ...)``,
      as pure trees of float32.

    Raises:
      ConfigError: another name, or classes below 1.
      WeightsError: there is no such file, PyTorch is missing, or the file does not hold
        the network of that name.
    """
    if name not in IMAGENET_RESNETS:
        names = ", ".join(IMAGENET_RESNETS)
        raise ConfigError(f"name must be one of {names}, got {name!r}")
    if classes is not None and classes < 1:
        raise ConfigError(f"classes must be at least 1, got {classes}")
    model = _abstract(name)
    tensors = read_tensors(Path(path))
    if classes is None:
        return from_state_dict(tensors, model, f"{path} as {name}")
    inputs = model.head.in_features
    del model.head
    tensors = {key: value for key, value in tensors.items() if key[:3] != "fc."}
    params, batch_stats = from_state_dict(tensors, model, f"{path} as {name}")
    head = torch_linear(inputs, classes, rngs=nnx.Rngs(seed))
    return params | {"head": nnx.to_pure_dict(nnx.state(head))}, batch_stats


def from_state_dict(
    tensors: Mapping[str, np.ndarray], model: ResNet, source: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Puts torchvision's tensors where our model has them.

    Args:
      tensors: by torchvision's names; ``num_batches_tracked`` is left out.
      model: a ResNet, which may be abstract (`flax.nnx.eval_shape`).
      source: where the tensors come from, for errors.

    Returns:
      params and batch_stats.

    Raises:
      WeightsError: a tensor is missing, unexpected or of the wrong shape.
    """
    trees = [
        nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat)
    ]
    tensors = {
        key: value
        for key, value in tensors.items()
        if not key.endswith("num_batches_tracked")
    }
    expected = [torch_name(path) for path, _ in jax.tree.leaves_with_path(trees)]
    missing = [key for key in expected if key not in tensors]
    unexpected = sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise WeightsError(
            f"{source}: {_some(missing)} missing, {_some(unexpected)} unexpected"
            + _hint(tensors, expected)
        )

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        key = torch_name(path)
        order = ORDERS.get(len(leaf.shape), (0,))
        shape, wanted = tensors[key].shape, tuple(leaf.shape[axis] for axis in order)
        if shape != wanted:
            raise WeightsError(
                f"{source}: {key} has the shape {shape}, expected {wanted}"
                + ("; classes= leaves the head out" if key[:3] == "fc." else "")
            )
        return jnp.asarray(np.transpose(tensors[key], np.argsort(order)), jnp.float32)

    params, batch_stats = jax.tree.map_with_path(place, trees)
    return params, batch_stats


def save_torchvision(path: str | Path, params: Any, batch_stats: Any) -> None:
    """Writes a ResNet as torchvision's ``load_state_dict`` takes it.

    In PyTorch: ``resnet50().load_state_dict(safetensors.torch.load_file(path))``.

    Args:
      path: of the file, ``.safetensors``.
      params: of resnet18, resnet34 or resnet50, as trained or as compressed.
      batch_stats: its batch statistics.

    Raises:
      OSError: it cannot be written.
    """
    with Writer(path) as file:
        file.metadata = {"format": "pt"}
        for name, tensor in state_dict(params, batch_stats):
            file.add(name, tensor)


def state_dict(params: Any, batch_stats: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Torchvision's names and tensors of our trees, what `from_state_dict` undoes."""
    for path, leaf in jax.tree.leaves_with_path((params, batch_stats)):
        name, array = torch_name(path), np.asarray(leaf, np.float32)
        yield name, array.transpose(ORDERS.get(array.ndim, (0,)))
        module, _, own = name.rpartition(".")
        if own == "running_var":
            # Torchvision counts batches; nothing reads it when momentum is a number.
            yield f"{module}.num_batches_tracked", np.zeros((), np.int64)


def torch_name(path: tuple[Any, ...]) -> str:
    """Torchvision's name of a leaf of our trees, by the path that jax gives for it."""
    *module, leaf = (entry.key for entry in path if hasattr(entry, "key"))
    if module == ["head"]:
        owner = "fc"
    elif module[0] == "stem":
        owner = {"conv": "conv1", "norm": "bn1"}[module[1]]
    else:
        stage, block = module[0].removeprefix("stage").split("_block")
        layer = {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}.get(
            module[1], module[1].replace("norm", "bn")
        )
        owner = f"layer{stage}.{int(block) - 1}.{layer}"
    return f"{owner}.{LEAVES[leaf]}"


def _abstract(name: str) -> ResNet:
    config = read_fields(ModelConfig, {"name": name})
    make = partial(make_model, config, 3, 1000)
    return cast(ResNet, nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def _hint(tensors: Mapping[str, np.ndarray], expected: list[str]) -> str:
    """What the file may be instead, judging by the names in it."""

    def body(names: Iterable[str]) -> set[str]:
        return {name for name in names if name[:3] != "fc."}

    if body(tensors) == body(expected):
        return "; classes= leaves the head out"
    for name in IMAGENET_RESNETS:
        leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(_abstract(name))))
        if body(tensors) == body(torch_name(path) for path, _ in leaves):
            return f"; its names are those of {name}"
    return ""


def _some(names: list[str]) -> str:
    """The number of names and the first of them."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensors" + (f" ({shown})" if names else "")
