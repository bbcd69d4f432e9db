"""Processes, devices, and the placement of a run's arrays: ``--mesh data=4,fsdp=2``."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.errors import ConfigError, RunError

AXES = ("data", "fsdp")


def join_processes(
    coordinator: str | None, processes: int | None, process: int | None
) -> None:
    """Joins the processes of a run; must be called before any other jax function.

    Args:
      coordinator: HOST:PORT of process 0, or ``auto`` if jax can ask the cluster (TPU,
        Slurm, Open MPI, Kubernetes). None: there is only this process.
      processes: how many there are.
      process: which of them this is, from 0.

    Raises:
      ConfigError: the three do not fit together.
      RunError: the others did not connect.
    """
    if coordinator == "auto":
        wrong = processes is not None or process is not None
        expected = "neither processes nor process"
    else:
        wrong = len({coordinator is None, processes is None, process is None}) > 1
        expected = "coordinator, processes and process together, or none of them"
    if not wrong and processes is not None and process is not None:
        wrong = not 0 <= process < processes
        expected = "0 <= process < processes"
    if wrong:
        raise ConfigError(
            f"expected {expected}, got coordinator={coordinator}, "
            f"processes={processes}, process={process}"
        )
    if coordinator is None:
        return
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"cannot join coordinator={coordinator}: {error}") from error


def is_first_process() -> bool:
    """Whether this process writes on behalf of all."""
    return jax.process_index() == 0


def on_first_process(function: Callable[[], None]) -> None:
    """Calls a function only on process 0; the others wait for it.

    Raises:
      RunError: it failed there, and this is another process.
    """
    error = None
    if is_first_process():
        try:
            function()
        except Exception as caught:
            error = caught
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and error is None:
            raise RunError("process 0 has stopped; its message says why")
    if error is not None:
        raise error


def make_mesh(text: str | None, batch_size: int) -> Mesh | None:
    """Reads a mesh, such as ``data=4,fsdp=2``.

    Every device gets an equal part of the batch. Parameters and the state of the
    optimiser are copied along ``data`` and cut along ``fsdp``.

    Args:
      text: sizes of axes; an omitted one has size 1. None: all devices along ``data``
        if there are several processes, and otherwise no mesh.
      batch_size: examples in a step, over all devices together.

    Returns:
      The mesh, over the first devices.

    Raises:
      ConfigError: it is malformed, there are not enough devices, it omits devices of
        some process, or it does not divide the batch.
    """
    several = jax.process_count() > 1
    if text is None:
        if not several:
            return None
        text = f"data={jax.device_count()}"
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if name not in AXES or not equals or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"mesh must be sizes of {' and '.join(AXES)}, such as data=4,fsdp=2, "
                f"got {text!r}"
            )
        sizes[name] = int(size)
    needed = math.prod(sizes.values())
    count = jax.device_count()
    if needed > count:
        raise ConfigError(f"mesh {text} needs {needed} devices, there are {count}")
    if several and needed < count:
        raise ConfigError(
            f"mesh {text} must use all {count} devices of {jax.process_count()} "
            f"processes, got {needed}"
        )
    if batch_size % needed:
        raise ConfigError(
            f"mesh {text} must divide the global batch_size={batch_size}, got "
            f"{needed} devices"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=jax.devices()[:needed],
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples, axis 0, over all devices."""
    return NamedSharding(mesh, P(AXES))


def own_rows(mesh: Mesh, count: int) -> np.ndarray:
    """The rows of a batch that the devices of this process need, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((count,))
    rows = np.arange(count)
    return np.unique(np.concatenate([rows[index] for index in places.values()]))


def assemble(mesh: Mesh, array: np.ndarray, own: np.ndarray, count: int) -> jax.Array:
    """A batch over a mesh, from this process's `own_rows`."""

    def rows(index: Any) -> np.ndarray:
        found: np.ndarray = array[np.searchsorted(own, np.arange(count)[index[0]])]
        return found

    return jax.make_array_from_callback(
        (count, *array.shape[1:]), batch_sharding(mesh), rows
    )


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """For each leaf of a state: along ``fsdp``, its longest axis that this divides.

    A leaf without one, and a single number, is copied to every device.
    """
    shards = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        sizes = [n if n % shards == 0 else 0 for n in leaf.shape]
        spec: list[str | None] = [None] * len(sizes)
        if shards > 1 and any(sizes):
            spec[sizes.index(max(sizes))] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(place, state)
