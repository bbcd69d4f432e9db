"""The engine against ONNX Runtime and OpenVINO, in one process, in turn.

    python -m benchmarks.engine
    python -m benchmarks.engine --networks bert6 resnet20 --rounds 3 --threads 1

Random weights; blocks of 4 inputs x 2 outputs of smallest norm are removed from every
layer but the first convolution. The others get the same pruned weights; they compute
the zeros. The CPU time of all threads counts, since the machine may be shared; wall
time is printed, too. All INT8 engines are calibrated with the input that is timed.
Targets, one thread, 90 %, over the best dense INT8: BERT 6x384 3, BERT-base 4,
ResNet-50 2.6, ResNet-20 6; at batch 16 BERT 6x384 2.5; two threads at least 1.5 times
one on BERT; BERT-base from its file in at most 2 s. Those about the batch and threads,
the latter on an idle machine, and what our kernels gain by each instruction set:

    python -m benchmarks.engine --networks bert6 --batch 16 --rounds 5
    for n in 1 2; do python -m benchmarks.engine --networks bert6 --threads $n; done
    for t in avx512vnni avx512 avx2vnni avx2; do
      python -m benchmarks.engine --ours --target $t
    done
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from benchmarks import timing
from cram_jax import engine
from cram_jax.engine.targets import choose_target
from experiments.deployment.graphs import bert_graph, image_graph
from experiments.deployment.peers import OnnxFiles, load_onnxruntime, load_openvino
from experiments.deployment.timing import measure
from experiments.images.config import ModelConfig
from experiments.images.models import make_model
from experiments.text.bert import Bert
from experiments.text.config import BASE, SMALL, BertConfig

Inputs = tuple[np.ndarray, ...]


def _bert(config: BertConfig, batch: int) -> tuple[engine.Graph, Inputs]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (batch, 128))
    graph = bert_graph(Bert(config, pooler=False, rngs=nnx.Rngs(0)))
    return graph, (ids, np.ones_like(ids), np.zeros_like(ids))


def _resnet(name: str, side: int, batch: int) -> tuple[engine.Graph, Inputs]:
    classes = 1000 if side == 224 else 10
    model = make_model(ModelConfig(name=name), 3, classes, nnx.Rngs(0))
    images = np.random.default_rng(0).standard_normal((batch, side, side, 3))
    return image_graph(model, (side, side)), (images.astype(np.float32),)


NETWORKS: dict[str, Callable[[int], tuple[engine.Graph, Inputs]]] = {
    "bert6": lambda batch: _bert(SMALL, batch),
    "bert_base": lambda batch: _bert(BASE, batch),
    "resnet50": lambda batch: _resnet("resnet50", 224, batch),
    "resnet20": lambda batch: _resnet("resnet20", 32, batch),
}


def prune(graph: engine.Graph, sparsity: float, block: tuple[int, int]) -> engine.Graph:
    """Removes the blocks of inputs x outputs of smallest norm from every layer."""
    first = next(n.name for n in graph.nodes if hasattr(n.operation, "kernel"))
    nodes = []
    for node in graph.nodes:
        part = node.operation
        is_first = node.name == first and isinstance(part, engine.Conv)
        if isinstance(part, engine.Linear | engine.Conv) and not is_first:
            kernel = _pruned(part.kernel, sparsity, block)
            part = dataclasses.replace(part, kernel=kernel)
        nodes.append(engine.Node(node.name, part, node.inputs))
    return engine.Graph(tuple(nodes), graph.outputs)


def _pruned(kernel: np.ndarray, sparsity: float, block: tuple[int, int]) -> np.ndarray:
    *window, inputs, outputs = kernel.shape
    rows, columns = (
        size if extent % size == 0 else 1
        for extent, size in zip((inputs, outputs), block, strict=True)
    )
    blocks = kernel.reshape(*window, inputs // rows, rows, outputs // columns, columns)
    norms = np.square(blocks).sum(axis=(-3, -1))
    kept = norms >= np.quantile(norms, sparsity)
    return (blocks * kept[..., :, None, :, None]).reshape(kernel.shape)


def peers(
    graph: engine.Graph, inputs: Inputs, folder: Path, threads: int
) -> dict[str, Callable[[], Any]]:
    """Runs of the same network in other engines, by name; those that are installed."""
    files = OnnxFiles(graph, [inputs], folder)
    feed = files.feed(inputs)
    is_text = inputs[0].dtype.kind == "i"
    runs: dict[str, Callable[[], Any]] = {}
    for label, form, load in (
        ("onnxruntime float32", "float32", load_onnxruntime),
        ("onnxruntime int8", "int8", load_onnxruntime),
        ("onnxruntime int8 dynamic", "dynamic", load_onnxruntime),
        ("openvino float32", "float32", load_openvino),
        ("openvino int8", "int8", load_openvino),
    ):
        if form == "dynamic" and not is_text:
            continue
        try:
            run = load(files.path(form), threads)
        except ImportError as error:
            print(f"no {label}: {error}")
            continue
        runs[label] = lambda run=run: run(feed)
    return runs


def compare(name: str, arguments: argparse.Namespace) -> None:
    """Prints the table of one network."""
    graph, inputs = NETWORKS[name](arguments.batch)
    runs: dict[str, Callable[[], Any]] = {}
    for label, block, int8 in (
        ("ours float32, single weights", (1, 1), False),
        ("ours int8, blocks (4, 2)", (4, 2), True),
    ):
        pruned = prune(graph, arguments.sparsity, block)
        start = time.process_time()
        compiled = engine.compile(
            pruned,
            calibration=[inputs] if int8 else None,
            threads=arguments.threads,
            attention=arguments.attention,
            target=arguments.target,
        )
        compiled(*inputs)
        seconds = time.process_time() - start
        print(
            f"{label}: compiled and run once in {seconds:.2f} CPU s, "
            f"from its file in {_reloaded(compiled, inputs):.2f}"
        )
        if arguments.tune:
            compiled.tune(*inputs)
        runs[label] = lambda compiled=compiled: compiled(*inputs)
    if arguments.profile:
        print(compiled.profile(*inputs))
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.ours:
            runs |= peers(pruned, inputs, Path(folder), arguments.threads)
        outputs = {label: np.asarray(run()) for label, run in runs.items()}
        times = measure(runs, arguments.rounds)
    exact = engine.compile(pruned, target=arguments.target)(*inputs)
    medians = {label: cpu.median for label, (cpu, _) in times.items()}
    dense = [m for n, m in medians.items() if "int8" in n and "ours" not in n]
    print(f"\n{name}, batch {arguments.batch}, {arguments.sparsity:.0%} pruned")
    print(f"{'':30} CPU ms (least, most)      wall ms   x int8   x f32   error")
    for label, (cpu, wall) in times.items():
        error = np.linalg.norm(outputs[label] - exact) / np.linalg.norm(exact)
        over_int8 = f"{min(dense) / cpu.median:.2f}" if dense else ""
        float32 = medians.get("onnxruntime float32")
        over_f32 = f"{float32 / cpu.median:.2f}" if float32 else ""
        note = "  other weights" if "single" in label else f"{error:8.1e}"
        print(
            f"{label:30} {cpu.median:8.3f} ({cpu.least:.3f}, {cpu.most:.3f}) "
            f"{wall.median:8.3f} {over_int8:>7} {over_f32:>7} {note}"
        )


def _reloaded(compiled: engine.Engine, inputs: Inputs) -> float:
    """CPU seconds to load an engine and to run it once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine"
        compiled.save(path)
        start = time.process_time()
        engine.load(path, threads=compiled.threads, target=compiled.target)(*inputs)
        return time.process_time() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the machine and a table for every network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--attention", choices=("int8", "float32"), default="int8")
    parser.add_argument("--target", choices=engine.TARGETS, help="of our engine")
    parser.add_argument("--ours", action="store_true", help="leave the others out")
    parser.add_argument("--tune", action="store_true", help="measure tiles first")
    parser.add_argument("--profile", action="store_true", help="time every node")
    arguments = parser.parse_args(argv)
    print(timing.machine())
    target = choose_target(arguments.target).name
    print(f"engine: {target}, {arguments.threads} threads")
    for name in arguments.networks:
        compare(name, arguments)


if __name__ == "__main__":
    main()
