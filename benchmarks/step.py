"""A training step of each update rule against one of SGD: time, memory, compilation.

    python -m benchmarks.step
    python -m benchmarks.step --workloads 0 --repeats 3

Same network, same batch, one process, the rules in turn. Every step donates its state,
as training loops do; peak memory is what XLA's analysis of the compiled step says:
arguments, outputs and temporaries, shared ones once. Targets: CrAM+ at most 2.05 times
SGD's time and 2.2 times its compilation; memory at most that of optax.contrib.sam and
one byte a parameter.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import cram_jax
from benchmarks import timing
from benchmarks.workloads import WORKLOADS, Workload

RHO = 0.05
SLOW = "CrAM+, switched on"


class Step(NamedTuple):
    """A compiled step.

    Attributes:
      run: takes one step from the state that the last one left; returns the loss.
      peak: bytes.
      compilation: seconds.
    """

    run: Callable[[], jax.Array]
    peak: int
    compilation: float


def compile_step(
    workload: Workload, optimizer: optax.GradientTransformation, **extra: Any
) -> Step:
    """Compiles a step of an optimiser, which gets the loss's inputs by name."""
    gradient_fn = jax.value_and_grad(workload.loss_fn, has_aux=True)
    extra = extra or workload.inputs

    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        (loss, _), grads = gradient_fn(params, **workload.inputs)
        updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(lambda leaf: leaf.copy(), workload.params)
    state = optimizer.init(params)
    lowered = jax.jit(step, donate_argnums=(0, 1))
    start = time.perf_counter()
    compiled = lowered.lower(params, state).compile()
    compilation = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    held = [params, state]

    def run() -> jax.Array:
        held[0], held[1], loss = compiled(*held)
        return loss, held

    return Step(run, peak, compilation)


def make_steps(workload: Workload, *, switched_on: bool) -> dict[str, Step]:
    """Compiles a step for each rule, all followed by SGD with momentum."""
    loss_fn = workload.loss_fn
    sparsities = (0.5, 0.7, 0.9)
    targets = [cram_jax.top_k(s, where=workload.where) for s in sparsities]
    multi = cram_jax.one_of(*targets)
    masks = cram_jax.one_of(*(cram_jax.cached(target, every=20) for target in targets))
    quarter = cram_jax.subsampled(loss_fn, *workload.batched, every=4)

    def plus(loss_fn: Any, projector: Any) -> Any:
        return cram_jax.cram_plus(loss_fn, projector, RHO, has_aux=True)

    full = plus(loss_fn, multi)
    rules = {
        "SGD": optax.identity(),
        "SAM": cram_jax.sam(loss_fn, RHO, has_aux=True),
        "CrAM": cram_jax.cram(loss_fn, multi, RHO, has_aux=True),
        "CrAM+": full,
        "CrAM+, masks kept for 20 uses": plus(loss_fn, masks),
        "CrAM+, a quarter of the batch": plus(quarter, multi),
        # The condition is data, so both sides are compiled: what "off" costs.
        "CrAM+, switched off": optax.conditionally_transform(full, lambda s: s < 0),
    }
    if switched_on:
        rules[SLOW] = optax.conditionally_transform(full, lambda s: s >= 0)
    steps = {
        name: compile_step(workload, optax.chain(rule, sgd()))
        for name, rule in rules.items()
    }
    grad_fn = jax.grad(lambda p, _: loss_fn(p, **workload.inputs)[0])
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    peer = optax.contrib.sam(sgd(), ascent, opaque_mode=True)
    steps["optax.contrib.sam"] = compile_step(workload, peer, grad_fn=grad_fn)
    return steps


def sgd() -> optax.GradientTransformation:
    return optax.sgd(0.01, momentum=0.9)


def measure(name: str, repeats: int, *, switched_on: bool) -> None:
    """Prints the table of one workload."""
    workload = WORKLOADS[name]()
    steps = make_steps(workload, switched_on=switched_on)
    projector = cram_jax.top_k(0.9, where=workload.where)
    project = jax.jit(lambda params: cram_jax.compress(params, projector).params)
    functions = {name: step.run for name, step in steps.items()}
    # Two compiled steps in turn, as the recipes say for CPU.
    functions["CrAM+, every 2nd step, two of them"] = lambda: [
        steps["CrAM+"].run(),
        steps["SGD"].run(),
    ]
    functions["the projection alone"] = lambda: project(workload.params)
    seconds = timing.interleaved(functions, repeats)

    count = sum(leaf.size for leaf in jax.tree.leaves(workload.params))
    print(f"\n{name}: {count:,} parameters; times SGD")
    sgd_step, peer = steps["SGD"], steps["optax.contrib.sam"]
    for rule, times in seconds.items():
        line = timing.row(rule, times, seconds["SGD"])
        if rule in steps:
            step = steps[rule]
            more = (step.peak - peer.peak) / count
            line += (
                f"  memory {step.peak / sgd_step.peak:.2f} x, "
                f"{more:+.2f} bytes a parameter against optax.contrib.sam"
                f"  compilation {step.compilation / sgd_step.compilation:.2f} x "
                f"({step.compilation:.1f} s)"
            )
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, and runs every workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbered = ", ".join(f"{i}: {name}" for i, name in enumerate(WORKLOADS))
    parser.add_argument("--workloads", type=int, nargs="+", help=numbered)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--switched-on", action="store_true", help="also a step inside lax.cond: slow"
    )
    options = parser.parse_args(arguments)
    print(timing.machine())
    names = np.array(list(WORKLOADS))
    for name in names if options.workloads is None else names[options.workloads]:
        measure(str(name), options.repeats, switched_on=options.switched_on)


if __name__ == "__main__":
    main()
