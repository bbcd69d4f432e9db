"""``export``: a model in a file that other engines and libraries take."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import tyro

from experiments.compression import targets
from experiments.compression.options import Layerwise
from experiments.compression.second_order import SecondOrder
from experiments.errors import ConfigError
from experiments.runs.directory import check_path, load_config
from experiments.verbs.common import check_named, start_jax

Format: TypeAlias = Literal[
    "huggingface", "torchvision", "packed", "onnx", "litert", "coreml"
]
LIBRARIES: tuple[Format, ...] = ("huggingface", "torchvision")
"""Whose tensors are dense, by the library's names."""

SUFFIXES: dict[Format, str] = {
    "torchvision": ".safetensors",
    "packed": ".safetensors",
    "onnx": ".onnx",
    "litert": ".tflite",
    "coreml": ".mlpackage",
}
BITS: dict[Format, tuple[int, ...]] = {
    "huggingface": (32,),
    "torchvision": (32,),
    "packed": (32, 16, 8, 4),
    "onnx": (32, 8, 4),
    "litert": (32, 8, 4),
    "coreml": (16, 8, 4),
}
"""The widths of weights that a format has, the usual one first."""


@dataclass(frozen=True)
class Export:
    """Write a model in a file that other engines and libraries take.

    It is compressed in one shot, batch norm is recalibrated, and the file of an engine
    is read back, run and compared with JAX: if it differs, there is an error and no
    file. huggingface and torchvision hold the tensors themselves.
    """

    run: tyro.conf.Positional[Path]
    """Directory of the run, or of a compressed model."""
    out: Path
    """The file, with the suffix of its format: .safetensors (packed, torchvision),
    .onnx, .tflite, .mlpackage; for huggingface a directory."""
    target: str = "dense"
    """What to compress to: k90, b90, 2:4, 4bit, 4bit@32, ..., see compress."""
    format: Format = "huggingface"
    """huggingface (of text) or torchvision (of images, ResNet-18, 34 and 50), which
    PyTorch reads; packed (masks and kept values, for cram_jax), onnx, litert
    (TensorFlow Lite) or coreml."""
    bits: int | None = None
    """Width of the weights in the file: packed 32, 16, 8 or 4; onnx 32, 8 (INT8,
    calibrated) or 4 (linear layers in blocks of 32); litert 32, 8 or 4; coreml 16, 8 or
    4. By default what the target rounds to, if the format has it, else the first."""
    tolerance: float | None = None
    """The largest difference from JAX, as a share of the largest output; by default
    0.25 if the file rounds weights that the target has not to integers, or activations
    as it runs (INT8 of onnx, integers of litert), 0.01 if it holds float16, else
    0.0001."""
    calibration: int = 200
    """Training examples that INT8 activations are calibrated with."""
    vocabulary: Path | None = None
    """For huggingface: vocab.txt or tokenizer.json, or a directory with one; by default
    the run's."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default where the run found it."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""
    second_order: SecondOrder = field(default_factory=SecondOrder)
    """Settings of second-order targets such as o90."""
    layerwise: Layerwise = field(default_factory=Layerwise)
    """Settings of targets that look at layer inputs: w90, g90, rk90 and so on."""

    @property
    def width(self) -> int:
        """The bits of the weights in the file."""
        if self.bits is not None:
            return self.bits
        last = targets.parse(self.target)[-1]
        rounded = last.numbers[0] if last.form in ("quantised", "nested") else 0
        # Only what the format holds exactly: blocks in ONNX, outputs in packed files.
        if self.format == "onnx" and rounded == 4 and not self.in_blocks:
            rounded = 0
        if self.format == "packed" and last.numbers[1:]:
            rounded = 0
        if last.form == "nested" and self.format == "packed":
            rounded = 8  # all of them are the leading bits of 8
        choices = BITS[self.format]
        return rounded if rounded in choices else choices[0]

    @property
    def in_blocks(self) -> bool:
        """Whether the target rounds in blocks of 32 inputs."""
        return targets.parse(self.target)[-1].numbers[1:] == (32,)

    def check(self) -> None:
        """The target is known, the format has the width, and the run can be read."""
        targets.check(self.target)
        choices = BITS[self.format]
        if self.width not in choices:
            expected = " or ".join(map(str, choices))
            raise ConfigError(
                f"bits must be {expected} for {self.format}, got {self.bits}"
            )
        suffix = SUFFIXES.get(self.format, self.out.suffix)
        if self.out.suffix != suffix:
            raise ConfigError(f"out must end in {suffix}, got {self.out}")
        if self.calibration < 1:
            raise ConfigError(f"calibration must be at least 1, got {self.calibration}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ConfigError(f"tolerance must be above 0, got {self.tolerance}")
        check_path(self.out)
        check_named(self.run, load_config(self.run), self.module)

    def execute(self) -> None:
        """Writes the file."""
        start_jax()
        from experiments.commands.export import export

        export(self)
