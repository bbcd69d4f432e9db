"""A training step of CrAM+ beside one of SGD: same model, same batch, one process.

    python -m benchmarks.step

Target: at most 2.1 times SGD. Peak memory is what XLA's analysis of the compiled step
says: arguments, outputs and temporaries.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import cram_jax
from benchmarks import timing
from experiments.models.resnet import ResNet

MODELS = {
    # widths, blocks, batch
    "ResNet-20, batch 128": ((16, 32, 64), (3, 3, 3), 128),
    "ResNet of 25 million, batch 32": ((64, 128, 256, 512), (3, 4, 9, 3), 32),
}

SWITCHED_ON = "CrAM+, switched on"


def steps(
    widths: Sequence[int], blocks: Sequence[int], batch: int
) -> tuple[int, dict[str, Callable[[], Any]], dict[str, float]]:
    """Builds the model, and one compiled step for each update rule.

    Args:
      widths: channels of each stage.
      blocks: blocks of each stage.
      batch: images of 32x32 in a step.

    Returns:
      The number of parameters, the steps by name, and their peak memory in bytes.
    """
    model = ResNet(widths, blocks, 3, 10, rngs=nnx.Rngs(0))
    graph, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, batch_stats = nnx.as_pure(params), nnx.as_pure(batch_stats)
    images = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    labels = jnp.arange(batch) % 10

    def loss_fn(params, batch_stats, images, labels):
        merged = nnx.merge(graph, params, batch_stats, copy=True)
        logits = merged(images, training=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), nnx.as_pure(nnx.state(merged, nnx.BatchStat))

    projector = cram_jax.one_of(*(cram_jax.top_k(s) for s in (0.5, 0.7, 0.9)))
    part = cram_jax.subsampled(loss_fn, "images", "labels", every=4)
    full = cram_jax.cram_plus(loss_fn, projector, 0.05, has_aux=True)
    rules = {
        "SGD": optax.identity(),
        "SAM": cram_jax.sam(loss_fn, 0.05, has_aux=True),
        "CrAM+": full,
        "CrAM+, a quarter": cram_jax.cram_plus(part, projector, 0.05, has_aux=True),
        # What "every k-th step" costs: the condition is data, so both sides compile.
        "CrAM+, switched off": optax.conditionally_transform(full, lambda s: s < 0),
        SWITCHED_ON: optax.conditionally_transform(full, lambda s: s >= 0),
    }

    def make(rule):
        optimizer = optax.chain(rule, optax.sgd(0.1, momentum=0.9))

        @jax.jit
        def step(params, state, batch_stats):
            inputs = {"batch_stats": batch_stats, "images": images, "labels": labels}
            (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, **inputs
            )
            updates, state = optimizer.update(grads, state, params, **inputs)
            return optax.apply_updates(params, updates), state, batch_stats, loss

        state = optimizer.init(params)
        compiled = step.lower(params, state, batch_stats).compile()
        memory = compiled.memory_analysis()
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
        )
        return lambda: compiled(params, state, batch_stats), peak

    made = {name: make(rule) for name, rule in rules.items()}
    masked = jax.jit(lambda p: cram_jax.compress(p, cram_jax.top_k(0.9)).params)
    functions = {name: function for name, (function, _) in made.items()}
    functions["the projection alone"] = lambda: masked(params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return count, functions, {name: peak for name, (_, peak) in made.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, and runs every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--switched-on", action="store_true", help="also a step inside lax.cond: slow"
    )
    options = parser.parse_args(arguments)
    print(timing.machine())
    for name, shape in MODELS.items():
        count, functions, peaks = steps(*shape)
        if not options.switched_on:
            del functions[SWITCHED_ON]
        seconds = timing.interleaved(functions, options.repeats)
        print(f"\n{name}: {count:,} parameters; times SGD")
        for rule, times in seconds.items():
            line = timing.row(rule, times, seconds["SGD"])
            if rule in peaks:
                line += f"  peak memory {peaks[rule] / peaks['SGD']:.2f} x"
            if rule != "the projection alone":
                loss = float(np.asarray(functions[rule]()[-1]))
                line += f"  loss {loss:.4f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
