"""What it costs to compile a training step of SGD, of optax's SAM and of CrAM+.

    python -m benchmarks.compile
    python -m benchmarks.compile --workloads 0 2 --repeats 3

CPU seconds of tracing, lowering and compiling, each in a process of its own and without
a compilation cache. Other work on the machine can add half to them: measure on an idle
one. Target: CrAM+ at most half of SGD's more than optax.contrib.sam.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import cram_jax
from benchmarks import timing
from benchmarks.workloads import WORKLOADS, Workload

RHO = 0.05
TARGET = 0.5


def sgd() -> optax.GradientTransformation:
    return optax.sgd(0.01, momentum=0.9)


def with_sgd(workload: Workload) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """An optimiser, and what its update gets besides, from the inputs of the loss."""
    del workload
    return sgd(), lambda inputs: {}


def with_optax_sam(workload: Workload) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """As `with_sgd`."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))

    def extra(inputs: Any) -> dict[str, Any]:
        return {"grad_fn": jax.grad(lambda p, _: workload.loss_fn(p, **inputs)[0])}

    return optax.contrib.sam(sgd(), ascent, opaque_mode=True), extra


def with_cram_plus(workload: Workload) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """As `with_sgd`, with three sparsities as in the paper."""
    targets = [cram_jax.top_k(s, where=workload.where) for s in (0.5, 0.7, 0.9)]
    rule = cram_jax.cram_plus(
        workload.loss_fn, cram_jax.one_of(*targets), RHO, has_aux=True
    )
    return optax.chain(rule, sgd()), lambda inputs: inputs


RULES = {
    "SGD": with_sgd,
    "optax.contrib.sam": with_optax_sam,
    "CrAM+": with_cram_plus,
}


def abstract(make: Callable[[], Workload]) -> Workload:
    """A workload of shapes, since initial weights take longer than compilation."""
    made = []

    def arrays() -> tuple[Any, Any]:
        made.append(make())
        return made[0].params, made[0].inputs

    params, inputs = jax.eval_shape(arrays)
    return made[0]._replace(params=params, inputs=inputs)


def compile_step(workload: Workload, rule: str) -> dict[str, float]:
    """Compiles a step; returns CPU seconds and the lines of its programs."""
    optimizer, extra = RULES[rule](workload)
    gradient_fn = jax.value_and_grad(workload.loss_fn, has_aux=True)

    def step(params: Any, state: Any, inputs: Any) -> tuple[Any, Any, jax.Array]:
        (loss, _), grads = gradient_fn(params, **inputs)
        updates, state = optimizer.update(grads, state, params, **extra(inputs))
        return optax.apply_updates(params, updates), state, loss

    arguments = (
        workload.params,
        jax.eval_shape(optimizer.init, workload.params),
        workload.inputs,
    )
    start = time.process_time()
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*arguments)
    trace = time.process_time()
    lowered = traced.lower()
    lower = time.process_time()
    compiled = lowered.compile()
    end = time.process_time()
    return {
        "trace": trace - start,
        "lower": lower - trace,
        "compile": end - lower,
        "total": end - start,
        "StableHLO": lowered.as_text().count("\n"),
        "HLO": compiled.as_text().count("\n"),
    }


def in_own_process(name: str, rule: str) -> dict[str, float]:
    """`compile_step` where nothing has been compiled before."""
    command = [sys.executable, "-m", "benchmarks.compile", "--one", name, rule]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout)


def measure(name: str, repeats: int) -> None:
    """Prints the table of one workload: medians, and the spread of the totals."""
    print(f"\n{name}: CPU seconds, lines of programs; times SGD")
    rounds = [
        {rule: in_own_process(name, rule) for rule in RULES} for _ in range(repeats)
    ]
    sgd_total = np.array([found["SGD"]["total"] for found in rounds])
    ratios = {}
    for rule in RULES:
        total = np.array([found[rule]["total"] for found in rounds])
        ratios[rule] = float(np.median(total / sgd_total))
        parts = [
            f"{part} {np.median([found[rule][part] for found in rounds]):.1f}"
            for part in ("trace", "lower", "compile")
        ]
        lines = [f"{part} {rounds[0][rule][part]:,}" for part in ("StableHLO", "HLO")]
        print(
            f"{rule:20s} {np.median(total):6.1f} s ({total.min():.1f} to "
            f"{total.max():.1f})  {ratios[rule]:.2f} x  {', '.join(parts + lines)}"
        )
    more = ratios["CrAM+"] - ratios["optax.contrib.sam"]
    verdict = "meets" if more <= TARGET else "misses"
    print(
        f"CrAM+ above optax.contrib.sam: {more:.2f} of SGD's, "
        f"{verdict} the target {TARGET}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, and compiles for every workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbered = ", ".join(f"{i}: {name}" for i, name in enumerate(WORKLOADS))
    parser.add_argument("--workloads", type=int, nargs="+", help=numbered)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        name, rule = options.one
        print(json.dumps(compile_step(abstract(WORKLOADS[name]), rule)))
        return
    print(timing.machine())
    names = np.array(list(WORKLOADS))
    for name in names if options.workloads is None else names[options.workloads]:
        measure(str(name), options.repeats)


if __name__ == "__main__":
    main()
