"""One run on 1, 2, 4 and 8 devices, and on two processes: the same, and what it moves.

    python -m benchmarks.scaling

The devices are parts of one CPU, so nothing gets faster here. What counts is that the
masks are identical, that losses agree up to rounding, and how many bytes devices
exchange in a step: of SGD, of CrAM+, and at most of the projection. Parameters are
copied along one axis ("data") or cut along it ("fsdp").
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cram_jax
from benchmarks import timing
from benchmarks.communication import collectives
from benchmarks.workloads import bert
from experiments.sharding import make_mesh, state_shardings
from experiments.text.config import TINY

STEPS = 5
BATCH = 16
# No collective of the selection over float32 runs more often.
PASSES = 11


def measure(axis: str, devices: int) -> dict[str, Any]:
    """Trains for some steps on a mesh; returns what to compare."""
    workload = bert(TINY, 32, BATCH)
    mesh = make_mesh(f"{axis}={devices}", BATCH)
    assert mesh is not None
    whole = NamedSharding(mesh, P())
    shardings = state_shardings(mesh, workload.params)
    projector = cram_jax.one_of(
        *(cram_jax.top_k(s, where=workload.where) for s in (0.5, 0.9))
    )
    plus = cram_jax.cram_plus(workload.loss_fn, projector, 0.05, has_aux=True)
    gradient_fn = jax.value_and_grad(workload.loss_fn, has_aux=True)

    def make_step(optimizer: Any) -> Any:
        def step(params: Any, state: Any, batch: Any) -> Any:
            (loss, _), grads = gradient_fn(params, **batch)
            updates, state = optimizer.update(grads, state, params, **batch)
            params = optax.apply_updates(params, updates)
            return jax.lax.with_sharding_constraint(params, shardings), state, loss

        return jax.jit(step)

    def place(tree: Any, where: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.make_array_from_callback(
                leaf.shape, sharding, lambda index: np.asarray(leaf)[index]
            ),
            tree,
            where,
        )

    params = place(workload.params, shardings)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    batch = place(workload.inputs, jax.tree.map(lambda _: rows, workload.inputs))
    moved = {}
    for name, rule in (("SGD", optax.identity()), ("CrAM+", plus)):
        optimizer = optax.chain(rule, optax.sgd(0.1))
        state = jax.jit(optimizer.init)(params)
        compiled = make_step(optimizer).lower(params, state, batch).compile()
        moved[name] = sum(size for _, size in collectives(compiled))
    losses = []
    for _ in range(STEPS):
        params, state, loss = compiled(params, state, batch)
        losses.append(float(loss))

    target = cram_jax.top_k(0.9, where=workload.where)
    project = jax.jit(lambda params: cram_jax.compress(params, target).masks)
    compiled = project.lower(params).compile()
    found = collectives(compiled)
    moved["the projection"] = PASSES * sum(size for _, size in found)
    masks = jax.jit(project, out_shardings=whole)(place_again(params, workload))
    digest = hashlib.sha256(
        b"".join(np.packbits(mask).tobytes() for mask in jax.tree.leaves(masks))
    )
    return {"losses": losses, "masks": digest.hexdigest()[:16], "moved": moved}


def place_again(params: Any, workload: Any) -> Any:
    """The first parameters where the last ones lie: masks do not depend on rounding."""
    return jax.tree.map(
        lambda new, old: jax.make_array_from_callback(
            old.shape, new.sharding, lambda index: np.asarray(old)[index]
        ),
        params,
        workload.params,
    )


def child(axis: str, devices: int, processes: int) -> dict[str, Any]:
    """Measures in processes of their own, as jax fixes its devices at the start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices // processes)}
    command = [sys.executable, "-m", "benchmarks.scaling", "--child"]
    command += [axis, str(devices), str(port), str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(process)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed; its message is above")
    return json.loads(outputs[0].splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, and measures every mesh."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        axis, devices, port, processes, process = options.child
        if int(processes) > 1:
            address = f"127.0.0.1:{port}"
            jax.distributed.initialize(address, int(processes), int(process))
        print(json.dumps(measure(axis, int(devices))))
        return

    print(timing.machine())
    one = child("data", 1, 1)
    count = sum(a.size for a in jax.tree.leaves(bert(TINY, 32, BATCH).params))
    print(f"\nBERT 2x128, {count:,} parameters, {4 * count:,} bytes; {STEPS} steps")
    print(
        "| axis | devices | processes | masks | largest difference of a loss |", end=""
    )
    print(" SGD, bytes | CrAM+, bytes | projection, bytes |")
    print("| --- " * 8 + "|")
    meshes = [(axis, n, 1) for axis in ("data", "fsdp") for n in (1, 2, 4, 8)]
    for axis, devices, processes in [*meshes, ("data", 2, 2), ("fsdp", 4, 2)]:
        result = child(axis, devices, processes)
        same = "identical" if result["masks"] == one["masks"] else "DIFFERENT"
        losses = np.array([result["losses"], one["losses"]])
        difference = np.abs(losses[0] / losses[1] - 1).max()
        cells = [f"{size:,}" for size in result["moved"].values()]
        row = [axis, devices, processes, same, f"{difference:.1e}", *cells]
        print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
