"""Smaller modules of NNX and Equinox: arrays cut, and widths of layers updated."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from cram_jax.structure.check import check_apply
from cram_jax.structure.shrink import shrink
from cram_jax.structure.structure import Structure

# For each attribute that is a width: the arrays and the axis that determine it.
WIDTHS: dict[str, tuple[tuple[str, int], ...]] = {
    "in_features": (("kernel", -2), ("weight", 1)),
    "out_features": (("kernel", -1), ("weight", 0)),
    "in_channels": (("weight", 1),),
    "out_channels": (("weight", 0),),
    "num_features": (("scale", -1), ("bias", -1), ("mean", -1)),
    "channels": (("weight", 0),),
    "features": (("embedding", 1),),
    "num_embeddings": (("embedding", 0), ("weight", 0)),
    "embedding_size": (("weight", 1),),
    "input_size": (("weight_ih", 1), ("weight", 0)),
    "hidden_size": (("weight_hh", 1),),
}
INPUTS = ("in_features", "in_channels")
GROUPS = ("feature_group_count", "groups")


def small_module(
    structure: Structure,
    module: Any,
    kept: Any,
    *,
    call: Callable[..., Any] | None = None,
) -> Any:
    """A copy of a module with the channels that stay.

    Arrays are cut, and attributes of layers that hold a width, such as
    ``out_features``, are updated. Then the program of the new module is compared with
    that of `small_apply`, as `check_apply` does, so that modules with hard-coded widths
    are refused.

    Args:
      structure: from `trace_structure`, of the state that ``nnx.split(module)`` gives,
        or of the arrays of an Equinox module, ``eqx.filter(module, eqx.is_array)``.
      module: an ``nnx.Module`` or an ``eqx.Module``, with its arrays.
      kept: as for `shrink`.
      call: ``(module, *inputs) -> outputs``, the function that was traced; by default
        ``module(*inputs)``.

    Returns:
      The smaller module.

    Raises:
      TypeError: it is a module of Linen or Haiku, which holds no arrays, or of any
        other framework.
      ValueError: as for `shrink`; or the smaller module would compute something else.

    Example:
      >>> from flax import nnx
      >>> from cram_jax.structure import small_module, trace_structure
      >>> model = nnx.Sequential(
      ...     nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu,
      ...     nnx.Linear(8, 2, rngs=nnx.Rngs(0)),
      ... )
      >>> graph, state = nnx.split(model)
      >>> structure = trace_structure(
      ...     lambda state, x: nnx.merge(graph, state)(x), state, jnp.ones((1, 3))
      ... )
      >>> small = small_module(structure, model, np.arange(8) < 5)
      >>> small.layers[0].out_features
      5
    """
    if _is_of("flax.nnx", module):
        small, with_variables = _small_nnx(structure, module, kept)
    elif _is_of("equinox", module):
        small, with_variables = _small_equinox(structure, module, kept)
    else:
        raise TypeError(_why_not(module))
    call = call or (lambda module, *inputs: module(*inputs))

    def apply(variables: Any, *inputs: Any) -> Any:
        return call(with_variables(variables), *inputs)

    reason = check_apply(structure, kept, apply=apply)
    if reason is not None:
        raise ValueError(
            f"module cannot be made smaller: {reason}; use small_apply instead"
        )
    return small


def _is_of(framework: str, module: Any) -> bool:
    """Whether it is a module of a framework, which must then have been imported."""
    loaded: Any = sys.modules.get(framework)
    return loaded is not None and isinstance(module, loaded.Module)


def _why_not(module: Any) -> str:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if _is_of("flax.linen", module) or kind.startswith("haiku."):
        return (
            f"module is {kind}, which holds no arrays and compares their shapes with "
            f"its own: build one with the widths of small_shapes, and ask "
            f"check_apply(structure, kept, apply=small.apply); or use small_apply"
        )
    return f"module must be an nnx.Module or an eqx.Module, got {kind}"


def _small_nnx(structure: Structure, module: Any, kept: Any) -> tuple[Any, Any]:
    """The smaller module, and a function from variables to it with those."""
    nnx: Any = sys.modules["flax.nnx"]
    graph, state = nnx.split(module)
    small = nnx.merge(graph, shrink(structure, state, kept))
    for (_, old), (_, new) in zip(
        nnx.iter_modules(module), nnx.iter_modules(small), strict=True
    ):
        for name, value in _widths(old, new):
            setattr(new, name, value)
    small_graph = nnx.graphdef(small)
    return small, lambda state: nnx.merge(small_graph, state)


def _small_equinox(structure: Structure, module: Any, kept: Any) -> tuple[Any, Any]:
    eqx: Any = sys.modules["equinox"]
    arrays, static = eqx.partition(module, eqx.is_array)
    small = eqx.combine(shrink(structure, arrays, kept), static)
    for old, new in zip(_submodules(eqx, module), _submodules(eqx, small), strict=True):
        for name, value in _widths(old, new):
            # Fresh from the partition, so nobody else has a reference to it.
            object.__setattr__(new, name, value)
    small_arrays, small_static = eqx.partition(small, eqx.is_array)
    treedef: Any = jax.tree.structure(small_arrays)

    def with_arrays(arrays: Any) -> Any:
        # Equinox keeps widths in the structure of the tree, where the old ones are.
        own = treedef.unflatten(jax.tree.leaves(arrays))
        return eqx.combine(own, small_static)

    return small, with_arrays


def _submodules(eqx: Any, module: Any) -> Iterator[Any]:
    yield module

    def is_inner(node: Any) -> bool:
        return node is not module and isinstance(node, eqx.Module)

    for node in jax.tree.leaves(module, is_leaf=is_inner):
        if is_inner(node):
            yield from _submodules(eqx, node)


def _widths(old: Any, new: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of a layer that its smaller arrays change."""
    groups = 1
    for name in GROUPS:
        if type(getattr(old, name, None)) is int and getattr(old, name) > 1:
            outputs = "out_features" if hasattr(old, "out_features") else "out_channels"
            wide, narrow = _width(old, outputs), _width(new, outputs)
            if wide and narrow:
                groups = getattr(old, name) * narrow // wide
                yield name, groups
    for name in WIDTHS:
        width = _width(new, name)
        if type(getattr(old, name, None)) is int and width is not None:
            yield name, width * (groups if name in INPUTS else 1)
    shape = getattr(old, "shape", None)  # of Equinox's LayerNorm and RMSNorm
    weight = _shape(new, "weight")
    if type(shape) is tuple and weight is not None and len(shape) == len(weight):
        yield "shape", weight


def _width(layer: Any, name: str) -> int | None:
    for array, axis in WIDTHS[name]:
        shape = _shape(layer, array)
        if shape is not None and -len(shape) <= axis < len(shape):
            return shape[axis]
    return None


def _shape(layer: Any, name: str) -> tuple[int, ...] | None:
    array = getattr(layer, name, None)
    if array is None or not hasattr(array, "shape") or not np.ndim(array):
        return None
    return tuple(int(size) for size in array.shape)
