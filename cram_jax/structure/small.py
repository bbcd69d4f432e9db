"""The smaller network as a function: the model's program with its sizes rewritten."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cram_jax.paths import named_leaves
from cram_jax.structure.groups import has_groups, kept_positions
from cram_jax.structure.labels import Kept
from cram_jax.structure.replay import Replay
from cram_jax.structure.shrink import as_kept, small_shapes
from cram_jax.structure.structure import Model, Structure
from cram_jax.structure.trace import read_program


def small_apply(structure: Structure, kept: Any) -> Callable[..., Any]:
    """The model's function for variables that `shrink` made smaller.

    The original program is applied to smaller arrays, with every size in it rewritten.
    So this works for every framework, and for models with hard-coded widths. Custom
    derivative rules and rematerialisation are kept: train it like the model's own
    function.

    It takes inputs of any shape that the model takes; under `jax.jit` there is no
    overhead once compiled. Random numbers, as for dropout, are those of the dense model
    at the positions that stay.

    Args:
      structure: from `trace_structure`, of all variables.
      kept: as for `shrink`.

    Returns:
      ``(small_variables, *inputs) -> outputs``, equal to the model's function of the
      masked variables.

    Raises:
      TypeError: as for `shrink`.
      ValueError: as for `shrink`; or the structure is a `Structure.part`. When called:
        a variable's path or shape is not what it shrinks to, or the model couples
        different channels for these inputs.

    Example:
      >>> from cram_jax.structure import shrink, small_apply, trace_structure
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.eye(4), "b": jnp.ones((4, 1))}
      >>> structure = trace_structure(apply, params, jnp.ones((1, 4)))
      >>> kept = np.array([True, False, True, True])
      >>> small = shrink(structure, params, kept)
      >>> small_apply(structure, kept)(small, jnp.ones((2, 4)))
      Array([[3.],
             [3.]], dtype=float32)
    """
    # If layers differ, the program is that of any one of them: see stacks.
    groups: Kept = np.atleast_2d(as_kept(structure, kept))[0]
    model = model_of(structure)

    def apply(variables: Any, *inputs: Any) -> Any:
        leaves = _check_small(structure, groups, variables)
        replay, result = _replay_for(structure, model, groups, leaves, inputs)
        return result.unflatten(replay([*leaves, *jax.tree.leaves(inputs)]))

    return apply


def model_of(structure: Structure) -> Model:
    """The traced model; raises for a part of one."""
    if structure.model is None:
        raise ValueError(
            "structure must be that of all variables, got a part of one: use what "
            "trace_structure returned"
        )
    return structure.model


def _check_small(structure: Structure, kept: Kept, variables: Any) -> list[Any]:
    expected = small_shapes(structure, kept)
    got = {path: tuple(np.shape(leaf)) for path, leaf in named_leaves(variables)}
    if got != expected:
        path = next(p for p in (*expected, *got) if expected.get(p) != got.get(p))
        raise ValueError(
            f"variables[{path!r}] must have the shape {expected.get(path)}, as shrink "
            f"returns it, got {got.get(path)}"
        )
    return jax.tree.leaves(variables)


def _replay_for(
    structure: Structure,
    model: Model,
    kept: Kept,
    leaves: list[Any],
    inputs: tuple[Any, ...],
) -> tuple[Replay, Any]:
    """The replay for inputs of these shapes, and the structure of what it returns."""
    abstract, types = jax.eval_shape(lambda *trees: trees, inputs, leaves)
    dense = structure.treedef.unflatten(
        jax.ShapeDtypeStruct(leaf.shape, array.dtype)
        for leaf, array in zip(structure.leaves, types, strict=True)
    )
    analysis, result = model.analysis, model.result
    if _types(abstract) != _types(model.inputs) or _types(dense) != _types(
        model.variables
    ):
        analysis, result = read_program(model.apply, dense, abstract, model.outputs)
    positions: list[list[Kept | None]] = [
        [
            kept_positions(leaf, axis, kept) if has_groups(leaf, axis) else None
            for axis in range(len(leaf.shape))
        ]
        for leaf in structure.leaves
    ]
    for var in analysis.program.jaxpr.invars[len(positions) :]:
        positions.append([None] * len(var.aval.shape))
    return Replay.of(analysis, positions), result


def _types(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]
