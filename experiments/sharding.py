"""Where the arrays of a run lie: ``--mesh data=4,fsdp=2``."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.errors import ConfigError

AXES = ("data", "fsdp")


def make_mesh(text: str, batch_size: int) -> Mesh:
    """Reads a mesh, such as ``data=4,fsdp=2``.

    Every device gets an equal part of the batch. Parameters and the state of the
    optimiser are copied along ``data`` and cut along ``fsdp``.

    Args:
      text: sizes of axes; one that is left out has size 1.
      batch_size: examples in a step, over all devices together.

    Returns:
      The mesh, over the first devices of all processes.

    Raises:
      ConfigError: it does not read so, there are not as many devices, or they do not
        divide the batch.
    """
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
    if needed > jax.device_count():
        raise ConfigError(
            f"mesh {text} needs {needed} devices, there are {jax.device_count()}"
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


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """For each leaf of a state: along ``fsdp``, its longest axis that this divides.

    A leaf without one, and a single number, is copied to every device.
    """
    shards = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        sizes = [n if n % shards == 0 else 0 for n in leaf.shape]
        spec = [None] * len(sizes)
        if shards > 1 and any(sizes):
            spec[sizes.index(max(sizes))] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(place, state)
