"""Files of weights as people publish them."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments.errors import WeightsError
from experiments.weight_files import read_tensors

TENSORS = {"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)}


def test_parts_are_put_together_by_their_index(tmp_path):
    places = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, tmp_path / f"part{number}.safetensors")
        places[name] = f"part{number}.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    found = read_tensors(index)
    assert set(found) == set(TENSORS)
    np.testing.assert_array_equal(found["a.weight"], TENSORS["a.weight"])
    for wrong, message in (
        ({"c": "part0.safetensors"}, "lacks c"),
        ({"c": "../secret.safetensors"}, "not a file beside it"),
        ({"c": "/etc/passwd"}, "not a file beside it"),
        ({"c": 3}, "not a file beside it"),
        ([], "not an index"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(WeightsError, match=message):
            read_tensors(index)


def test_the_prefix_of_parallel_training_is_taken_off(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in TENSORS.items()}, path)
    assert set(read_tensors(path)) == set(TENSORS)


@pytest.mark.parametrize("form", ["plain", "wrapped", "parameters", "pairs"])
def test_what_pytorch_saves_in_several_forms_is_read(form, tmp_path):
    torch = pytest.importorskip("torch", reason="reads .pth files")
    tensors = {name: torch.from_numpy(t.copy()) for name, t in TENSORS.items()}
    saved = {
        "plain": tensors,
        "wrapped": {"state_dict": tensors, "epoch": 3},
        "parameters": {n: torch.nn.Parameter(t) for n, t in tensors.items()},
        "pairs": list(tensors.items()),
    }[form]
    torch.save(saved, tmp_path / "x.pth")
    found = read_tensors(tmp_path / "x.pth")
    np.testing.assert_array_equal(found["a.weight"], TENSORS["a.weight"])
