"""From a function and its variables to their structure."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.paths import named_leaves
from cram_jax.projector import check_arrays
from cram_jax.structure.costs import count_costs
from cram_jax.structure.interpret import Analysis, Input, analyse
from cram_jax.structure.labels import Ids, Role, Source
from cram_jax.structure.stacks import with_layers
from cram_jax.structure.structure import (
    MODEL_INPUT,
    MODEL_OUTPUT,
    Family,
    Leaf,
    Member,
    Model,
    Structure,
    axis_roles,
)
from cram_jax.validation import check_function

ONE_SIDED = "nothing computes it or nothing sums over it, so that no channel is removed"
_PRODUCES = Role.OUTPUT | Role.BATCH
_READS = Role.INPUT | Role.CONTRACTED


def trace_structure(
    apply: Callable[..., Any],
    variables: Any,
    *inputs: Any,
    outputs: Callable[[Any], Any] | None = None,
) -> Structure:
    """Reads from a model's trace what its axes do and which channels are coupled.

    Works for any function of a pytree of arrays, whatever its framework: the program is
    traced and read, not run. Values do not matter, so `jax.ShapeDtypeStruct` will do
    for variables and inputs.

    Masked and smaller networks agree only on their outputs, so no output may become
    smaller. If a model also returns hidden activations or new batch statistics, select
    the outputs that count.

    Args:
      apply: ``(variables, *inputs) -> outputs``, as for `jax.jit`. Values that it
        closes over are constants, not part of the structure.
      variables: a pytree of arrays: parameters, batch statistics, or both.
      *inputs: pytrees of arrays, of shapes that the model is used with. The smaller
        network can be called with other shapes. Close over arguments that are not
        arrays, such as ``training=False``.
      outputs: selects the outputs whose shapes must stay, from what `apply` returns; by
        default all.

    Returns:
      The structure, which prints the roles of all axes, the families of coupled
      channels, and why everything else is frozen.

    Raises:
      TypeError: `apply` is not a function, or a leaf of `variables` is not an array.
      ValueError: `variables` has no leaves, or `outputs` returns something that is not
        among the outputs.

    Example:
      >>> from cram_jax.structure import trace_structure
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"] + params["b"]) @ params["c"]
      >>> shapes = {"a": (6, 16), "b": (16,), "c": (16, 3)}
      >>> params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
      >>> trace_structure(apply, params, jax.ShapeDtypeStruct((4, 6), jnp.float32))
      Structure of 3 parameters: 16 groups in 1 families
        a  6 input x 16 output
        b  16 other
        c  16 input x 3 output
      families
        0: 16 groups of a[1], b[0], c[0]
      frozen, 0 of 16 inner channels
        a model input: a[0]
        a model output: c[1]
    """
    check_function("apply", apply)
    check_arrays("variables", variables)
    variables, inputs = jax.eval_shape(lambda *trees: trees, variables, inputs)
    leaves = named_leaves(variables)
    if not leaves:
        raise ValueError(f"variables must have at least one array, got {variables!r}")
    analysis, result = read_program(apply, variables, inputs, outputs)
    members, groups, group_of = _find_groups(analysis, len(leaves))
    bits = analysis.labels.role_bits()
    described = tuple(
        _leaf(analysis, number, path, leaf.shape, bits, group_of)
        for number, (path, leaf) in enumerate(leaves)
    )
    families = tuple(
        _family(family, described, bits, analysis, start, size)
        for family, start, size in zip(members, *groups, strict=True)
    )
    return Structure(
        described,
        with_layers(analysis, group_of, families, described),
        jax.tree.structure(variables),
        count_costs(analysis, group_of, len(leaves)),
        Model(apply, variables, outputs, analysis, inputs, result),
    )


def read_program(
    apply: Callable[..., Any],
    variables: Any,
    inputs: tuple[Any, ...],
    outputs: Callable[[Any], Any] | None,
) -> tuple[Analysis, Any]:
    """Traces a function and labels it.

    Returns:
      The labelled program and the structure of what the function returns.
    """
    program, result = jax.make_jaxpr(apply, return_shape=True)(variables, *inputs)
    specs = [
        Input(Source.WEIGHT, zero=bool(jnp.issubdtype(leaf.dtype, jnp.inexact)))
        for leaf in jax.tree.leaves(variables)
    ]
    specs += [Input(Source.ACTIVATION, zero=False, frozen=MODEL_INPUT)] * len(
        jax.tree.leaves(inputs)
    )
    frozen = [MODEL_OUTPUT if f else None for f in _chosen(result, outputs)]
    return analyse(program, specs, frozen), jax.tree.structure(result)


def _chosen(result: Any, outputs: Callable[[Any], Any] | None) -> list[bool]:
    count = len(jax.tree.leaves(result))
    if outputs is None:
        return [True] * count
    treedef: Any = jax.tree.structure(result)
    numbers = treedef.unflatten(range(count))
    picked = jax.tree.leaves(outputs(numbers))
    if not picked or not all(type(n) is int and 0 <= n < count for n in picked):
        raise ValueError(
            "outputs must pick some of what apply returns unchanged, got "
            f"{outputs(numbers)!r} of {numbers!r}"
        )
    return [number in picked for number in range(count)]


MemberKey = tuple[int, int, int]


def _find_groups(
    analysis: Analysis, leaves: int
) -> tuple[list[tuple[MemberKey, ...]], tuple[list[int], list[int]], Ids]:
    """The families, where each begins and its size, and the group of each label.

    Classes that nothing computes or nothing reads are frozen here.
    """
    root = analysis.root
    members: dict[int, list[MemberKey]] = {}
    for number, value in enumerate(analysis.inputs[:leaves]):
        for axis, factors in enumerate(value.axes):
            for part, factor in enumerate(factors):
                for label in dict.fromkeys(root[factor.ids].tolist()):
                    members.setdefault(label, []).append((number, axis, part))
    bits = np.zeros(len(root), int)
    for ids, role in analysis.labels.roles:
        np.bitwise_or.at(bits, root[ids], int(role))
    two_sided = ((bits & int(_READS)) != 0) & ((bits & int(_PRODUCES)) != 0)
    by_family: dict[tuple[MemberKey, ...], list[int]] = {}
    for label, axes in sorted(members.items()):
        if label in analysis.reasons:
            continue
        if two_sided[label]:
            by_family.setdefault(tuple(axes), []).append(label)
        else:
            analysis.reasons[label] = ONE_SIDED
    group_of_class: Ids = np.full(len(root), -1)
    starts, sizes, start = [], [], 0
    for labels in by_family.values():
        group_of_class[labels] = np.arange(start, start + len(labels))
        starts.append(start)
        sizes.append(len(labels))
        start += len(labels)
    return list(by_family), (starts, sizes), group_of_class[root]


def _leaf(
    analysis: Analysis,
    number: int,
    path: str,
    shape: Sequence[int],
    bits: Ids,
    group_of: Ids,
) -> Leaf:
    axes = analysis.inputs[number].axes
    parts = [[factor.ids for factor in axis] for axis in axes]
    frozen = []
    for runs in parts:
        labels = {label for ids in runs for label in analysis.root[ids].tolist()}
        reasons = {analysis.reasons[n] for n in labels if n in analysis.reasons}
        frozen.append(tuple(sorted(reasons)))
    return Leaf(
        path,
        tuple(shape),
        axis_roles(shape, parts, bits),
        tuple(tuple(group_of[ids] for ids in runs) for runs in parts),
        tuple(frozen),
    )


def _family(
    keys: Sequence[MemberKey],
    leaves: Sequence[Leaf],
    bits: Ids,
    analysis: Analysis,
    start: int,
    size: int,
) -> Family:
    members = []
    for number, axis, part in keys:
        leaf = leaves[number]
        ids = analysis.inputs[number].axes[axis][part].ids
        is_kernel = "input" in leaf.roles or "lookup" in leaf.roles
        produces = bool((bits[ids] & int(_PRODUCES)).any()) and is_kernel
        name = leaf.axis_name(axis, part)
        members.append(Member(number, axis, part, name, produces))
    return Family(tuple(members), start, size)
