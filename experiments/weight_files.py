"""Tensors by name, from the files in which people publish weights."""

import importlib.util
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from experiments.errors import WeightsError, first_line

WRAPPERS = ("state_dict", "model_state_dict")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file.

    A state dict may be wrapped, as in ``{"state_dict": ...}``, may hold parameters
    instead of tensors, and its names may all start with ``module.``, as after training
    in parallel.

    Args:
      path: ``.safetensors``; ``.safetensors.index.json`` or ``.bin.index.json``, which
        name files next to them; or ``.pth``, ``.pt`` or ``.bin``, which PyTorch reads.

    Returns:
      The tensors; bfloat16 ones keep their dtype, or are float32 if PyTorch reads them.

    Raises:
      WeightsError: there is no such file, PyTorch is missing, or the file holds
        something else.
    """
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    if path.name.endswith(".index.json"):
        tensors = _read_parts(path)
    elif path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".bin"):
        tensors = _read_pickle(path)
    else:
        raise WeightsError(f"{path} must be a .safetensors, .pth, .pt or .bin file")
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    return tensors


def _read_parts(index: Path) -> dict[str, np.ndarray]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index} is not an index of weights: {first_line(error)}"
        ) from error
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{index} names {name!r}, which is not a file beside it")
        tensors |= read_tensors(index.parent / name)
    if missing := sorted(set(places) - set(tensors)):
        raise WeightsError(f"{index}: {places[missing[0]]} lacks {missing[0]}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path} cannot be read as safetensors: {first_line(error)}"
        ) from error
    return dict(tensors)


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    if importlib.util.find_spec("torch") is None:
        raise WeightsError(
            f"{path} is a pickle of PyTorch: install torch, or convert it where torch "
            "is, with safetensors.torch.save_file(torch.load(...), 'x.safetensors')"
        )
    import torch  # not among our dependencies

    try:
        # Only tensors: a pickle of anything else could run code.
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        OSError,
        AttributeError,
        KeyError,
    ) as error:
        raise WeightsError(
            f"PyTorch cannot read {path}: {first_line(error)}"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if isinstance(found, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in found
    ):
        found = dict(found)  # as named_parameters() gives them
    if not isinstance(found, Mapping):
        raise WeightsError(f"{path} holds a {type(found).__name__}, not a state dict")
    tensors = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"{path} is not a state dict: its {name!r} is a {type(value).__name__}"
            )
        value = value.detach()
        # NumPy has no bfloat16 for torch to convert to.
        tensors[name] = (value.float() if value.is_floating_point() else value).numpy()
    return tensors
