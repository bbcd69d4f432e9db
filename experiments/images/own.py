"""Networks of a user's own: built by a factory, and made smaller again."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cram_jax.structure import Structure, kept_groups, small_module, trace_structure
from experiments.errors import ConfigError


def own_model(name: str, channels: int, classes: int, rngs: nnx.Rngs) -> nnx.Module:
    """Calls a factory of the user's.

    Raises:
      ConfigError: it cannot be imported, or what it makes is no NNX module.
    """
    package, _, factory = name.partition(":")
    try:
        make = getattr(importlib.import_module(package), factory)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.module={name} cannot be imported: {error}") from error
    try:
        model = make(channels=channels, classes=classes, rngs=rngs)
    except TypeError as error:
        raise ConfigError(
            f"model.module={name} must take channels=, classes= and rngs=: {error}"
        ) from error
    if not isinstance(model, nnx.Module):
        kind = type(model).__name__
        raise ConfigError(f"model.module={name} must make an nnx.Module, got {kind}")
    known = (nnx.Param, nnx.BatchStat)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if isinstance(variable, known):
            continue
        raise ConfigError(
            f"model.module={name} must make a network with only parameters and batch "
            f"statistics, got {type(variable).__name__} at {'/'.join(map(str, path))}; "
            f"dropout is not supported"
        )
    return model


def check_call(
    name: str, make: Callable[[], nnx.Module], shape: tuple[int, int, int], classes: int
) -> None:
    """Calls a network on an abstract image.

    Raises:
      ConfigError: it cannot be called as ours are, or returns something else.
    """
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    try:
        logits = nnx.eval_shape(lambda x: _call(make(), x), images)
    except TypeError as error:
        raise ConfigError(
            f"model.module={name} must make a network that is called as "
            f"model(images, training=False), here with {images.shape}: {error}"
        ) from error
    found = getattr(logits, "shape", type(logits).__name__)
    if found != (1, classes):
        raise ConfigError(
            f"model.module={name} must make a network that returns logits of shape "
            f"(batch, {classes}), got {found} for a batch of 1"
        )


def narrowed(
    model: nnx.Module, shape: tuple[int, int, int], widths: tuple[int, ...]
) -> nnx.Module:
    """The network with fewer channels, the first ones of each family.

    Args:
      model: as its factory makes it.
      shape: of an image.
      widths: how many channels are left of each family, in the order of
        `trace_structure`.

    Raises:
      ConfigError: there is another number of families, or the module cannot be made
        smaller; the message says why.
    """
    structure = _structure(model, shape)
    sizes = tuple(family.size for family in structure.families)
    fits = len(widths) == len(sizes)
    if not fits or any(w > s for w, s in zip(widths, sizes, strict=True)):
        raise ConfigError(
            f"layer_widths must be at most {sizes} for {type(model).__name__}, whose "
            f"channels those are, got {widths}"
        )
    kept = np.zeros(structure.size, bool)
    for family, width in zip(structure.families, widths, strict=True):
        kept[family.start : family.start + width] = True
    try:
        return small_module(structure, model, kept, call=_call)
    except ValueError as error:
        raise ConfigError(f"{type(model).__name__}: {error}") from error


def widths_left(
    model: nnx.Module, shape: tuple[int, int, int], masks: Mapping[str, Any]
) -> tuple[int, ...]:
    """How many channels masks leave of each family, see `narrowed`.

    Args:
      model: the network.
      shape: of an image.
      masks: of parameters and batch statistics by path, whole groups.
    """
    structure = _structure(model, shape)
    tree = structure.treedef.unflatten(masks[leaf.path] for leaf in structure.leaves)
    kept = np.atleast_2d(kept_groups(structure, tree))[0]
    return tuple(int(kept[family.groups].sum()) for family in structure.families)


def _structure(model: nnx.Module, shape: tuple[int, int, int]) -> Structure:
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return trace_structure(lambda s, x: _call(nnx.merge(graph, s), x), state, images)


def _call(model: Any, images: Any) -> Any:
    return model(images, training=False)
