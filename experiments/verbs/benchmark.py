"""``benchmark``: engines side by side."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from experiments.compression import targets
from experiments.compression.options import Layerwise, PrunerOptions
from experiments.compression.second_order import SecondOrder
from experiments.errors import ConfigError
from experiments.runs.directory import check_output, load_config
from experiments.verbs.common import check_named, start_jax

EngineName = Literal[
    "cram",
    "cram-float32",
    "onnxruntime",
    "onnxruntime-int8",
    "onnxruntime-dynamic",
    "openvino",
    "openvino-int8",
    "jit",
]


@dataclass(frozen=True)
class Benchmark:
    """Run networks in several engines and compare time, size and accuracy.

    CPU time of all threads and wall time are medians of rounds in which the engines
    take turns. Engines that multiply zeros run only the dense network; dense INT8 is
    always included for comparison with ours.
    """

    networks: tyro.conf.Positional[tuple[str, ...]]
    """Directories of runs; or networks with random weights: resnet20, resnet50,
    vgg16_bn_cifar and the like, bert6x384, bert_base."""
    engines: tuple[EngineName, ...] = (
        "cram",
        "cram-float32",
        "onnxruntime",
        "onnxruntime-int8",
        "onnxruntime-dynamic",
        "openvino-int8",
        "jit",
    )
    """cram is ours in INT8; jit is the network in JAX, float32, on all cores."""
    target: tuple[str, ...] = ("dense", "b90")
    """What our engine runs: k90 (90 % zeros), b90 (in blocks of 4 inputs x 2 outputs),
    and so on; see evaluate."""
    batch: tuple[int, ...] = (1,)
    """Sizes of a batch."""
    threads: tuple[int, ...] = (1,)
    """Numbers of threads."""
    rounds: int = 9
    """Measurements of each engine."""
    calibration: int = 1000
    """Training examples that INT8 is calibrated with."""
    method: Literal["minmax", "percentile", "least_squares"] = "minmax"
    """How our engine chooses the ranges of INT8 activations."""
    no_accuracy: bool = False
    """Leave out the evaluation set."""
    tune: bool = False
    """Measure tiles of our engine first; they are kept in the user's cache."""
    out: Path | None = None
    """A JSON file for the numbers; a table in Markdown is written beside it."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; by default where the run found it."""
    module: str | None = None
    """The model.module of a run with a network of your own, to allow its import."""
    second_order: SecondOrder = field(default_factory=SecondOrder)
    """Settings of second-order targets such as o90."""
    layerwise: Layerwise = field(default_factory=Layerwise)
    """Settings of targets that look at layer inputs: w90, g90, rk90 and so on."""

    def check(self) -> None:
        """Targets are known, numbers in range, and runs can be read."""
        if not self.networks:
            raise ConfigError("benchmark needs a run or the name of a network")
        for name in self.target:
            targets.check(name)
        for field_name in ("batch", "threads"):
            for value in getattr(self, field_name):
                if value < 1:
                    raise ConfigError(f"{field_name} must be at least 1, got {value}")
        for field_name in ("rounds", "calibration"):
            if getattr(self, field_name) < 1:
                raise ConfigError(
                    f"{field_name} must be at least 1, got {getattr(self, field_name)}"
                )
        if self.out is not None:
            check_output(self.out, ".json")
        for network in self.networks:
            if (Path(network) / "config.json").exists():
                run = Path(network)
                check_named(run, load_config(run), self.module)

    def execute(self) -> None:
        """Measures, prints and stores."""
        start_jax()
        from experiments.commands.benchmark import benchmark
        from experiments.deployment.benchmark import Conduct

        conduct = Conduct(
            engines=self.engines,
            targets=self.target,
            batches=self.batch,
            threads=self.threads,
            rounds=self.rounds,
            calibration=self.calibration,
            method=self.method,
            judge=not self.no_accuracy,
            tune=self.tune,
        )
        benchmark(
            self.networks,
            conduct,
            self.out,
            self.data_dir,
            PrunerOptions(self.second_order, self.layerwise),
        )
