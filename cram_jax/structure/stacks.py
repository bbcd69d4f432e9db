"""Layers that are stacked for a scan: which may each lose different channels.

Every layer keeps its remaining channels in their order, and all layers share one
program of the smaller network. That is correct if the program does not depend on the
order of the channels, and if no channel leaves its layer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cram_jax.structure.interpret import Analysis, Labelled, called
from cram_jax.structure.labels import Factor, Ids, Key, Value
from cram_jax.structure.movement import GENERATORS
from cram_jax.structure.structure import Family, Leaf, Structure


def with_layers(
    analysis: Analysis,
    group_of: Ids,
    families: Sequence[Family],
    leaves: Sequence[Leaf],
) -> tuple[Family, ...]:
    """The families, each with the number of layers that may lose different channels.

    Args:
      analysis: the labelled program.
      group_of: the group of each label; -1 where it stays.
      families: of the groups.
      leaves: the parameters.
    """
    lengths = [_stack_length(family, leaves) for family in families]
    if not any(lengths):
        return tuple(families)
    touching = _touching(analysis, group_of, families)
    return tuple(
        family._replace(layers=length)
        if length and _is_of_one_layer(analysis, group_of, family, touching[number])
        else family
        for number, (family, length) in enumerate(zip(families, lengths, strict=True))
    )


def _stack_length(family: Family, leaves: Sequence[Leaf]) -> int:
    """The one length of the stacks that the family runs along; else 0."""
    of_members = [leaves[member.leaf] for member in family.members]
    lengths = {leaf.shape[0] if leaf.roles[0] == "stack" else 0 for leaf in of_members}
    on_stack = any(member.axis == 0 for member in family.members)
    return 0 if on_stack or len(lengths) != 1 else lengths.pop()


def _touching(
    analysis: Analysis, group_of: Ids, families: Sequence[Family]
) -> list[list[Key]]:
    """For each family, the equations that have a channel of it in or out."""
    family_of = np.repeat(np.arange(len(families)), [f.size for f in families])
    touching: list[list[Key]] = [[] for _ in families]
    for key, labelled in analysis.equations.items():
        found: set[int] = set()
        for factor in _factors((*labelled.ins, *labelled.outs)):
            groups = group_of[factor.ids]
            found |= set(family_of[groups[groups >= 0]].tolist())
        for number in found:
            touching[number].append(key)
    return touching


def _is_of_one_layer(
    analysis: Analysis, group_of: Ids, family: Family, keys: Sequence[Key]
) -> bool:
    scans = [k for k in keys if analysis.equations[k].eqn.primitive.name == "scan"]
    if not scans or any(
        _has(group_of, family, (constant,)) for constant in analysis.constants.values()
    ):
        return False
    scan = min(scans, key=len)
    for key in keys:
        labelled = analysis.equations[key]
        if key == scan:
            holds = _only_slices(group_of, family, labelled)
        elif key[: len(scan)] == scan:
            holds = labelled.eqn.primitive.name not in GENERATORS
        else:  # it must be a call that contains the scan
            holds = key == scan[: len(key)] and called(labelled.eqn) is not None
        if not holds or not _in_any_order(group_of, family, labelled):
            return False
    return True


def _only_slices(group_of: Ids, family: Family, scan: Labelled) -> bool:
    """Whether a scan slices the channels, and carries none of them on.

    They may be in what it stacks: any use of that is an equation outside.
    """
    carried = scan.eqn.params["num_carry"]
    first = scan.eqn.params["num_consts"] + carried
    return not _has(group_of, family, (*scan.ins[:first], *scan.outs[:carried]))


def _in_any_order(group_of: Ids, family: Family, labelled: Labelled) -> bool:
    """Whether channels only occur all together, in their order."""
    whole = family.start + np.arange(family.size)
    for factor in _factors((*labelled.ins, *labelled.outs)):
        groups = group_of[factor.ids]
        if np.isin(groups, whole).any():
            if len(groups) % family.size:
                return False
            if (groups.reshape(-1, family.size) != whole).any():
                return False
    return True


def _has(group_of: Ids, family: Family, values: Sequence[Value]) -> bool:
    groups = family.start + np.arange(family.size)
    return any(np.isin(group_of[f.ids], groups).any() for f in _factors(values))


def _factors(values: Sequence[Value]) -> list[Factor]:
    return [factor for value in values for axis in value.axes for factor in axis]


def stacked_leaves(structure: Structure, layers: int) -> list[bool]:
    """For each parameter, whether it holds so many layers with their own channels."""
    numbers = {
        member.leaf
        for family in structure.families
        if family.layers == layers > 1
        for member in family.members
    }
    return [number in numbers for number in range(len(structure.leaves))]


def one_layer(structure: Structure, layers: int) -> Structure:
    """The structure of a single layer, without the axis of the layers."""
    stacked = stacked_leaves(structure, layers)
    leaves = tuple(
        unstacked(leaf) if of_layers else leaf
        for leaf, of_layers in zip(structure.leaves, stacked, strict=True)
    )
    families = tuple(
        family._replace(
            members=tuple(
                member._replace(axis=member.axis - 1)
                if stacked[member.leaf]
                else member
                for member in family.members
            )
        )
        for family in structure.families
    )
    return Structure(leaves, families, structure.treedef, structure.costs)


def unstacked(leaf: Leaf) -> Leaf:
    """A parameter of one layer."""
    tails: dict[str, Any] = {
        name: getattr(leaf, name)[1:] for name in ("shape", "roles", "groups", "frozen")
    }
    return leaf._replace(**tails)
