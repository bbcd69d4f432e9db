"""Two processes with four devices each, against one with eight."""

import json
import socket
import subprocess
import sys

import numpy as np

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cram_jax import compress, cram_plus, n_m, one_of, top_k

port, processes, process = map(int, sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 8 // processes)
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["first"])
    return jnp.mean((hidden @ params["last"] - y) ** 2)

def put(array, spec):
    # Each process has the rows of its own devices.
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

keys = jax.random.split(jax.random.key(0))
params = {
    "first": put(np.asarray(jax.random.normal(keys[0], (8, 16))), P("fsdp")),
    "last": put(np.asarray(jax.random.normal(keys[1], (16, 4))), P(("fsdp", "data"))),
}
projector = one_of(top_k(0.5), top_k(0.9), n_m(2, 4))
optimizer = optax.chain(cram_plus(loss_fn, projector, 0.1), optax.sgd(0.1))
state = jax.jit(optimizer.init)(params)

@jax.jit
def advance(params, state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, **batch)
    updates, state = optimizer.update(grads, state, params, **batch)
    return optax.apply_updates(params, updates), state, loss

losses = []
for step in range(5):
    x = np.random.default_rng(step).normal(size=(16, 8)).astype(np.float32)
    batch = {"x": put(x, P(("data", "fsdp"))), "y": put(x[:, :4], P(("data", "fsdp")))}
    params, state, loss = advance(params, state, batch)
    losses.append(float(loss))
masks = jax.jit(
    lambda params: compress(params, top_k(0.8)).masks,
    out_shardings=NamedSharding(mesh, P()),
)(params)
kept = {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}
if process == 0:
    print(json.dumps({"losses": losses, "kept": kept, "devices": jax.device_count()}))
"""


def run(processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(processes), str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return json.loads(outputs[0][0].splitlines()[-1])


def test_two_processes_give_what_one_gives():
    one, two = run(1), run(2)
    assert one["devices"] == two["devices"] == 8
    assert one["kept"] == two["kept"]
    assert sum(map(len, one["kept"].values())) == 192 - int(0.8 * 192)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)


CACHED = """
import os, sys
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cram_jax import keep_largest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
array = jax.ShapeDtypeStruct(
    (64, 8), "float32", sharding=NamedSharding(mesh, P("fsdp"))
)
jax.jit(lambda x: keep_largest([x], 9)).lower(array).compile()
"""


def test_a_new_process_finds_what_another_one_compiled(tmp_path):
    command = [sys.executable, "-c", CACHED, str(tmp_path)]

    def compiled():
        return {path.name for path in tmp_path.iterdir() if "-cache" in path.name}

    subprocess.run(command, check=True, timeout=300)
    first = compiled()
    assert first
    subprocess.run(command, check=True, timeout=300)
    assert compiled() == first
