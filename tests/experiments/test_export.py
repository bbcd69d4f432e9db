"""``export``: files of a run for other engines and libraries, written and run."""

import dataclasses

import pytest
from flax import nnx

from experiments.__main__ import main
from experiments.images.config import ModelConfig
from experiments.recipes import digits
from experiments.runs import checkpoints
from experiments.runs.directory import write_status

pytest.importorskip("llvmlite")
pytest.importorskip("onnxruntime")
# coremltools and jax2onnx import modules that warn.
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore"),
]
EXTRAS = {
    "litert": ("litert_converter", "ai_edge_litert", "ai_edge_quantizer"),
    "coreml": ("coremltools", "stablehlo_coreml"),
    "jax2onnx": ("jax2onnx", "onnx_ir"),
}
OWN = """
from flax import nnx

class Net(nnx.Module):
    def __init__(self, channels, classes, rngs):
        self.conv = nnx.Conv(channels, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, images, training):
        x = self.norm(self.conv(images), use_running_average=not training)
        return self.head(nnx.relu(x).mean((1, 2)))
"""


def need(extra):
    for module in EXTRAS.get(extra, ()):
        pytest.importorskip(module, reason=f"needs the extra {extra}")


@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        ("--target k90 --format packed", "k90.safetensors", "tolerance 0.0001"),
        ("--bits 16 --format packed", "half.safetensors", "tolerance 0.01"),
        # Its scales are of blocks, which only floats hold.
        ("--target 4bit@32 --format packed", "blocks.safetensors", "tolerance 0.0001"),
        (
            "--target b90+nested4 --format packed",
            "nested.safetensors",
            "+ 8 of 8 bits It holds all 8 bits: load_packed(..., bits=4) reads the",
        ),
        (
            "--target nested4 --bits 4 --format packed",
            "leading.safetensors",
            "compressed to 4 of 8 bits Largest difference",
        ),
        ("--target 2:4 --format onnx", "half.onnx", "tolerance 0.0001"),
        ("--target 4bit --bits 4 --format onnx", "int4.onnx", "tolerance 0.25"),
        ("--target 8bit --calibration 64 --format onnx", "int8.onnx", "tolerance 0.25"),
        ("--format litert", "dense.tflite", "tolerance 0.0001"),
        # Activations are rounded while it runs.
        ("--target 8bit --format litert", "int8.tflite", "tolerance 0.25"),
        ("--target 4bit@32bf16 --format litert", "int4.tflite", "tolerance 0.25"),
    ],
)
def test_runs_are_written_run_and_compared(run, tmp_path, capsys, options, name, words):
    need(options.split()[-1])
    assert main(f"export {run} --out {tmp_path / name} {options}".split()) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Largest difference from JAX on 32 examples" in text
    assert words in text
    before, after = (
        float(text.split(start)[1].split(" %")[0])
        for start in ("dense, ", "Accuracy of the file: ")
    )
    assert after == pytest.approx(before, abs=1)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_cannot_be_run_here_says_so(run, tmp_path, capsys):
    need("coreml")
    path = tmp_path / "network.mlpackage"
    command = f"export {run} --target b90+8bit --format coreml --out {path}"
    assert main(command.split()) == 0
    assert "It cannot be run on this machine" in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_beyond_the_tolerance_there_is_no_file(run, tmp_path, capsys):
    command = f"export {run} --format onnx --tolerance 1e-12"
    assert main([*command.split(), "--out", str(tmp_path / "network.onnx")]) == 1
    assert "differs from JAX by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def own(data_dir, tmp_path_factory):
    """A run of a network of the user's own, and the place of its module."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_network.py").write_text(OWN)
    names = {}
    exec(OWN, names)
    module = names["Net"](1, 10, nnx.Rngs(0))
    trees = (nnx.to_pure_dict(nnx.state(module, k)) for k in (nnx.Param, nnx.BatchStat))
    model = ModelConfig(module="own_network:Net")
    config = dataclasses.replace(digits.config, name="own", model=model)
    checkpoints.save_model(folder / "run", config, *trees)
    write_status(folder / "run", data_dir=str(data_dir))
    return folder


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("--target k50 --format packed", "own.safetensors"),
        ("--format onnx", "own.onnx"),
        ("--format litert", "own.tflite"),
        ("--format coreml", "own.mlpackage"),
    ],
)
def test_networks_of_one_s_own_are_written(
    own, tmp_path, monkeypatch, capsys, options, name
):
    form = options.split()[-1]
    need("jax2onnx" if form == "onnx" else form)
    monkeypatch.syspath_prepend(own)
    command = f"export {own / 'run'} --out {tmp_path / name} {options}"
    assert main([*command.split(), "--module", "own_network:Net"]) == 0
    text = capsys.readouterr().out
    assert ("tolerance 0.0001" in text) == (form != "coreml")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_an_own_network_has_no_graph_for_fewer_bits(own, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(own)
    command = f"export {own / 'run'} --format onnx --bits 4 --out {tmp_path / 'o.onnx'}"
    assert main([*command.split(), "--module", "own_network:Net"]) == 1
    assert "bits must be 32 for own_network.Net" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("huggingface", "format must be torchvision or one of an engine for a run on"),
        ("torchvision", "torchvision has resnet18, resnet34, resnet50 with all their"),
    ],
)
def test_a_library_without_such_a_network_is_refused(
    run, tmp_path, capsys, form, message
):
    path = tmp_path / "network.safetensors"
    assert main(f"export {run} --format {form} --out {path}".split()) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--format onnx --out x.tflite", "out must end in .onnx, got x.tflite"),
        ("--format onnx --bits 2 --out x.onnx", "bits must be 32 or 8 or 4 for onnx"),
        ("--target k9x --out x", "target 'k9x' is unknown"),
        ("--tolerance 0 --out x", "tolerance must be above 0, got 0.0"),
        ("--calibration 0 --out x", "calibration must be at least 1, got 0"),
    ],
)
def test_options_are_checked_before_it_starts(options, message, capsys):
    assert main(["export", "nowhere", *options.split()]) == 1
    assert message in capsys.readouterr().err
