"""One pass of second-order pruning: its time, its memory, and what is left.

    python -m benchmarks.second_order
    python -m benchmarks.second_order --sizes 0.2 --gradients 64

The model is a stack of square layers on random images, so that gradients are cheap and
the pruner is what is timed; a magnitude projection and the gradients by themselves are
printed for comparison. Peak memory is what XLA's analysis of the programs says:
arguments, outputs and temporaries. One recomputation; the pruner's default of several
takes as many times as long, in the same memory. 25 million parameters need about 8 GB,
and on two CPU cores most of an hour.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import cram_jax
from benchmarks import timing

LAYERS = 4


def run(millions: float, gradients: int, sparsity: float, repeats: int) -> None:
    """Prints the table of one size."""
    width = round((millions * 1e6 / LAYERS) ** 0.5)
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    params = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[1:]]
    examples = {"x": jax.random.normal(keys[0], (gradients, width))}

    def loss_fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        hidden = x
        for kernel in params:
            hidden = jnp.tanh(hidden @ kernel)
        return jnp.mean(hidden**2)

    def all_gradients(
        params: list[jax.Array], examples: dict[str, jax.Array]
    ) -> object:
        def squares(total, x):
            one = jax.grad(loss_fn)(params, x[None])
            return jax.tree.map(lambda t, g: t + g**2, total, one), None

        start = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(squares, start, examples["x"])[0]

    def magnitude(params: list[jax.Array], examples: object) -> object:
        del examples
        return cram_jax.compress(params, cram_jax.top_k(sparsity))

    size = sum(leaf.size for leaf in params)
    print(f"\n{size:,} parameters, {gradients} gradients, blocks of 50", flush=True)
    projector = cram_jax.second_order(sparsity, loss_fn, examples, recomputations=1)
    peaks = {"second-order pruning": projector.peak_memory(params)}
    functions = {"second-order pruning": lambda: cram_jax.compress(params, projector)}
    for name, function in {
        "the gradients alone": all_gradients,
        "magnitude pruning": magnitude,
    }.items():
        program = jax.jit(function).lower(params, examples).compile()
        memory = program.memory_analysis()
        peaks[name] = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
        )
        functions[name] = lambda program=program: program(params, examples)
    seconds = timing.interleaved(functions, repeats)
    for name, peak in peaks.items():
        print(
            timing.row(name, seconds[name], seconds["second-order pruning"])
            + f"  {peak / 1e6:,.0f} MB, {peak / (4 * size):.0f} floats a parameter",
            flush=True,
        )
    masks = functions["second-order pruning"]().masks
    kept = sum(int(mask.sum()) for mask in masks)
    # The last solve included.
    each = 1e3 * np.median(seconds["second-order pruning"]) / gradients
    print(f"keeps {kept:,}, {each:.1f} ms a gradient")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, and runs every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[1, 25], help="in millions"
    )
    parser.add_argument("--gradients", type=int, default=1024)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args(arguments)
    print(timing.machine())
    for millions in options.sizes:
        run(millions, options.gradients, options.sparsity, options.repeats)


if __name__ == "__main__":
    main()
