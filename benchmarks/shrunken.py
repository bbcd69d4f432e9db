"""How much faster networks with half of their channels are, in jit and in engines.

    python -m benchmarks.shrunken
    python -m benchmarks.shrunken --networks bert6 --rounds 5

Random weights. A BERT loses half of the heads and hidden units of every layer, a ResNet
the half of all channels that `channels` chooses, once freely and once in multiples of
8. The CPU time of all threads counts, since the machine may be shared. Target: half of
a BERT at least 1.8 times faster everywhere.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import timing
from benchmarks.engine import Inputs, peers
from cram_jax import compress, engine
from cram_jax.structure import channels, kept_groups, small_shapes, trace_structure
from experiments.deployment.graphs import bert_graph, image_graph
from experiments.deployment.timing import measure
from experiments.images.config import ModelConfig
from experiments.images.models import make_model, read_layer_widths
from experiments.text.bert import Bert
from experiments.text.config import BASE, SMALL, BertConfig

Run = Callable[[], Any]


def berts(config: BertConfig) -> dict[str, BertConfig]:
    """A BERT, and the same with half of its heads and units."""
    layers = config.num_hidden_layers
    half = dataclasses.replace(
        config,
        layer_heads=(config.num_attention_heads // 2,) * layers,
        layer_units=(config.intermediate_size // 2,) * layers,
    )
    return {"dense": config, "half": half}


def resnets(name: str, side: int) -> dict[str, ModelConfig]:
    """A ResNet, and the same with half of its channels, freely and in eights."""
    config = ModelConfig(name=name)
    graph, state = nnx.split(make_model(config, 3, 10, nnx.Rngs(0)))

    def apply(state: Any, images: Any) -> Any:
        return nnx.merge(graph, state)(images, training=False)

    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    structure = trace_structure(apply, state, images)
    found = {"dense": config}
    for label, multiple in (("half", 1), ("half, in eights", 8)):
        masks = compress(state, channels(0.5, structure, multiple_of=multiple)).masks
        shapes = small_shapes(structure, kept_groups(structure, masks))
        shapes = {path.removesuffix("/value"): s for path, s in shapes.items()}
        widths = read_layer_widths(shapes)
        found[label] = dataclasses.replace(config, layer_widths=widths)
    return found


def runs_of(
    module: nnx.Module,
    graph: engine.Graph,
    inputs: Inputs,
    folder: Path,
    threads: int,
) -> dict[str, Run]:
    """The same network in jit, in our engine and in others."""
    definition, state = nnx.split(module)
    function = jax.jit(lambda s, *x: nnx.merge(definition, s)(*x, training=False))
    runs: dict[str, Run] = {
        "jit": lambda: jax.block_until_ready(function(state, *inputs))
    }
    for label, calibration in (("float32", None), ("int8", [inputs])):
        compiled = engine.compile(graph, calibration=calibration, threads=threads)
        runs[f"ours {label}"] = lambda compiled=compiled: compiled(*inputs)
    folder.mkdir()
    return runs | peers(graph, inputs, folder, threads)


def text_runs(config: BertConfig, batch: int, folder: Path, threads: int) -> Any:
    """Of sequences of 128 tokens."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, 128))
    inputs = ids, np.ones_like(ids), np.zeros_like(ids)
    model = Bert(config, pooler=False, rngs=nnx.Rngs(0))
    return runs_of(model, bert_graph(model), inputs, folder, threads)


def image_runs(
    config: ModelConfig, side: int, batch: int, folder: Path, threads: int
) -> Any:
    """Of square images."""
    model: Any = make_model(config, 3, 10, nnx.Rngs(0))
    images = np.random.default_rng(0).standard_normal((batch, side, side, 3))
    inputs = (images.astype(np.float32),)
    return runs_of(model, image_graph(model, (side, side)), inputs, folder, threads)


def networks(name: str) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The sizes of a network by their label, and what makes runs of one."""
    texts = {"bert6": SMALL, "bert_base": BASE}
    if name in texts:
        return berts(texts[name]), text_runs
    side = 224 if name in ("resnet18", "resnet50") else 32

    def make(config: ModelConfig, batch: int, folder: Path, threads: int) -> Any:
        return image_runs(config, side, batch, folder, threads)

    return resnets(name, side), make


def compare(name: str, arguments: argparse.Namespace) -> None:
    """Prints the table of one network."""
    sizes, make = networks(name)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            (label, kind): run
            for number, (label, config) in enumerate(sizes.items())
            for kind, run in make(
                config, arguments.batch, Path(folder) / str(number), arguments.threads
            ).items()
        }
        times = measure(runs, arguments.rounds)
    print(f"\n{name}, batch {arguments.batch}: CPU ms (least, most), times faster")
    for kind in dict.fromkeys(kind for _, kind in runs):
        cpu = {label: times[label, kind][0] for label in sizes}
        cells = [
            f"{label} {ms.median:.2f} ({ms.least:.2f}, {ms.most:.2f}) "
            f"{cpu['dense'].median / ms.median:.2f}"
            for label, ms in cpu.items()
        ]
        print(f"{kind:26}", " | ".join(cells))
    for label, config in sizes.items():
        if widths := getattr(config, "layer_widths", ()):
            print(f"widths, {label}: {' '.join(map(str, widths))}")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the machine and a table for every network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["bert6", "bert_base", "resnet20"]
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    print(timing.machine())
    for name in arguments.networks:
        compare(name, arguments)


if __name__ == "__main__":
    main()
