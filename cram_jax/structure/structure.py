"""What a traced model says about its parameters, as a readable value."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from cram_jax import Axes
from cram_jax.paths import named_leaves
from cram_jax.structure.costs import Costs
from cram_jax.structure.interpret import Analysis
from cram_jax.structure.labels import Ids, Role

MODEL_INPUT, MODEL_OUTPUT = "a model input", "a model output"
"""Why channels are frozen that the model shares with what is around it."""


class Member(NamedTuple):
    """A part of an axis of a parameter that belongs to a family.

    Attributes:
      leaf: number of the parameter, in the order of ``jax.tree.leaves``.
      axis: number of the axis.
      part: which of the parts that the model splits the axis into, outer to inner.
      name: such as ``"dense/kernel[1]"``, or ``"qkv/kernel[1.2]"`` for one of several
        parts.
      produces: whether this axis of a kernel computes the channels of the family,
        rather than scaling, shifting or reading them.
    """

    leaf: int
    axis: int
    part: int
    name: str
    produces: bool


class Family(NamedTuple):
    """Channels that are coupled along the same axes: the units of one layer, say.

    Attributes:
      members: the axes.
      start: number of its first group.
      size: how many groups it has.
      layers: how many layers, stacked for a scan, may each lose different groups; 1 if
        all lose the same.
    """

    members: tuple[Member, ...]
    start: int
    size: int
    layers: int = 1

    @property
    def groups(self) -> slice:
        """Its groups among those of the structure."""
        return slice(self.start, self.start + self.size)

    @property
    def names(self) -> tuple[str, ...]:
        """The axes as they print."""
        return tuple(member.name for member in self.members)


class Leaf(NamedTuple):
    """A parameter.

    Attributes:
      path: such as ``"dense/kernel"``.
      shape: as it was traced.
      roles: what each axis does: one of the roles of `cram_jax.Axes`, or None.
      groups: for each axis and each of its parts, the group of each position; -1 if the
        position may not be removed.
      frozen: for each axis, why positions of it may not be removed.
    """

    path: str
    shape: tuple[int, ...]
    roles: tuple[str | None, ...]
    groups: tuple[tuple[Ids, ...], ...]
    frozen: tuple[tuple[str, ...], ...]

    def axis_name(self, axis: int, part: int | None = None) -> str:
        """An axis, as printed.

        Args:
          axis: its number.
          part: which of the parts that the model splits it into; None: the whole axis.

        Returns:
          The name, such as ``"dense/kernel[1]"``.
        """
        if part is None or len(self.groups[axis]) == 1:
            return f"{self.path}[{axis}]"
        return f"{self.path}[{axis}.{part}]"


@dataclass(frozen=True)
class TracedAxes:
    """The axes of each parameter by its path, as a function of path and leaf.

    Attributes:
      entries: pairs of path and axes.
    """

    entries: tuple[tuple[str, Axes], ...]

    def __call__(self, path: str, leaf: Any) -> Axes | None:
        """The axes of a parameter; None if it was not among those that were traced."""
        del leaf
        return dict(self.entries).get(path)


class Model(NamedTuple):
    """The traced model.

    Attributes:
      apply: the function.
      variables: its first argument, abstract.
      outputs: selects the outputs that count; None for all.
      analysis: the labelled program.
      inputs: structure and types of the inputs that it was traced for.
      result: the structure of the outputs.
    """

    apply: Callable[..., Any]
    variables: Any
    outputs: Callable[[Any], Any] | None
    analysis: Analysis
    inputs: Any
    result: Any


@dataclass(frozen=True, eq=False, repr=False)
class Structure:
    """The axes of a model's parameters, and which channels are coupled.

    Made by `trace_structure`. A group is a set of positions that can only be removed
    together: a channel in the kernel that computes it, in the bias and normalisation,
    and in every kernel that reads it. Groups are numbered family by family.

    Attributes:
      leaves: one for each parameter, in the order of ``jax.tree.leaves``.
      families: the groups, by the axes that they run along.
      treedef: the structure of the variables.
      costs: how many parameters and multiply-adds are left when groups go.
      model: the traced model; None for a `part`.
    """

    leaves: tuple[Leaf, ...]
    families: tuple[Family, ...]
    treedef: Any
    costs: Costs
    model: Model | None = field(default=None)

    @property
    def size(self) -> int:
        """How many groups there are."""
        return sum(family.size for family in self.families)

    @property
    def frozen(self) -> dict[str, tuple[str, ...]]:
        """Why positions of an axis may not be removed, by the name of the axis."""
        return {
            leaf.axis_name(axis): reasons
            for leaf in self.leaves
            for axis, reasons in enumerate(leaf.frozen)
            if reasons
        }

    @property
    def frozen_channels(self) -> tuple[int, int]:
        """How many inner channels may not be removed, and how many there are.

        Inner channels are the outputs of all kernels and lookup tables, except for
        those that the model shares with what is around it, as its own inputs or
        outputs.
        """
        outside = {MODEL_INPUT, MODEL_OUTPUT}
        fixed = total = 0
        for leaf in self.leaves:
            for axis, role in enumerate(leaf.roles):
                reasons = leaf.frozen[axis]
                is_inner = not reasons or not outside.issuperset(reasons)
                if role == "output" and is_inner:
                    total += leaf.shape[axis]
                    fixed += _fixed(leaf.groups[axis])
        return fixed, total

    @property
    def axes(self) -> "TracedAxes":
        """What the axes do, for the ``axes=`` of any projector of these parameters."""
        return TracedAxes(tuple((leaf.path, Axes(*leaf.roles)) for leaf in self.leaves))

    def part(self, select: Callable[[Any], Any]) -> "Structure":
        """The structure of some of the variables, such as the parameters only.

        The groups stay the same, so a choice made for the part holds for the whole.

        Args:
          select: selects a subtree, such as ``lambda variables: variables["params"]``.

        Returns:
          A structure that masks and shrinks trees like that subtree.

        Raises:
          ValueError: the function selects nothing, or changes what it selects.

        Example:
          >>> from cram_jax.structure import trace_structure
          >>> def apply(variables, x):
          ...     params, means = variables["params"], variables["means"]
          ...     return jax.nn.relu(x @ params["a"] - means) @ params["b"]
          >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
          >>> variables = {"params": params, "means": jnp.ones(4)}
          >>> structure = trace_structure(apply, variables, jnp.ones((1, 3)))
          >>> structure.part(lambda variables: variables["params"]).families[0].names
          ('a[1]', 'b[0]')
        """
        numbers = self.treedef.unflatten(range(len(self.leaves)))
        chosen = select(numbers)
        picked = jax.tree.leaves(chosen)
        known = set(range(len(self.leaves)))
        if not picked or not all(type(n) is int and n in known for n in picked):
            raise ValueError(
                f"select must pick a subtree of the variables unchanged, got {chosen!r}"
            )
        paths = [path for path, _ in named_leaves(chosen)]
        leaves = tuple(
            self.leaves[n]._replace(path=path)
            for n, path in zip(picked, paths, strict=True)
        )
        place = {number: i for i, number in enumerate(picked)}
        families = tuple(
            family._replace(
                members=tuple(
                    member._replace(
                        leaf=place[member.leaf],
                        name=leaves[place[member.leaf]].axis_name(
                            member.axis, member.part
                        ),
                    )
                    for member in family.members
                    if member.leaf in place
                )
            )
            for family in self.families
        )
        return Structure(leaves, families, jax.tree.structure(chosen), self.costs)

    def __repr__(self) -> str:
        lines = [self._headline(), *self._leaf_lines()]
        return "\n".join([*lines, *self._family_lines(), *self._frozen_lines()])

    def _headline(self) -> str:
        return (
            f"Structure of {len(self.leaves)} parameters: {self.size} groups in "
            f"{len(self.families)} families"
        )

    def _leaf_lines(self) -> list[str]:
        width = max((len(leaf.path) for leaf in self.leaves), default=0)
        return [
            f"  {leaf.path:{width}}  "
            + " x ".join(
                f"{size} {role or '?'}"
                for size, role in zip(leaf.shape, leaf.roles, strict=True)
            )
            for leaf in self.leaves
        ]

    def _family_lines(self) -> list[str]:
        return ["families"] * bool(self.families) + [
            f"  {number}: {family.size} groups{_of_layers(family)} of "
            f"{', '.join(family.names)}"
            for number, family in enumerate(self.families)
        ]

    def _frozen_lines(self) -> list[str]:
        by_reasons: dict[tuple[str, ...], list[str]] = {}
        for name, reasons in self.frozen.items():
            by_reasons.setdefault(reasons, []).append(name)
        headline = "frozen, {} of {} inner channels".format(*self.frozen_channels)
        return [headline] * bool(by_reasons) + [
            f"  {'; '.join(reasons)}: {', '.join(names)}"
            for reasons, names in by_reasons.items()
        ]


def _fixed(parts: Sequence[Ids]) -> int:
    """How many positions of an axis none of its groups removes."""
    return math.prod(int((groups < 0).sum()) for groups in parts)


def _of_layers(family: Family) -> str:
    return f" in each of {family.layers} layers" if family.layers > 1 else ""


def axis_roles(
    shape: Sequence[int], parts: Sequence[Sequence[Ids]], bits: np.ndarray[Any, Any]
) -> tuple[str | None, ...]:
    """The role of each axis, from what the trace noted of its labels."""
    seen = []
    for runs in parts:
        noted = Role.NONE
        for ids in runs:
            noted |= Role(int(np.bitwise_or.reduce(bits[ids])))
        seen.append(noted)
    everything = Role(int(np.bitwise_or.reduce(np.array([0, *seen]))))
    reads = Role.INPUT | Role.WINDOW | Role.LOOKUP | Role.KERNEL
    if everything == Role.NONE:
        # Such as the scale of a batch norm, which is combined with its statistics
        # first.
        return ("other",) if len(shape) == 1 else (None,) * len(shape)
    if not everything & reads:
        return tuple("stack" if noted & Role.STACK else "other" for noted in seen)
    if everything & Role.LOOKUP:
        # An embedding that is also used as a kernel still has rows to look up.
        seen = [noted & ~Role.INPUT for noted in seen]
    roles = [_kernel_role(noted) for noted in seen]
    # Axes of size 1 have no labels: they take the roles that are missing.
    unnoted = [i for i, size in enumerate(shape) if size == 1]
    for role in ("output", "input"):
        if unnoted and role not in roles and "lookup" not in roles:
            roles[unnoted.pop()] = role
    for axis in unnoted:
        roles[axis] = "window"
    return tuple(roles)


def _kernel_role(noted: Role) -> str | None:
    if noted & (Role.STACK | Role.BATCH):
        return "stack"
    if noted & Role.LOOKUP:
        return "lookup"
    if noted & Role.WINDOW:
        return "window"
    if noted & Role.INPUT and noted & Role.OUTPUT:
        return None
    if noted & Role.INPUT:
        return "input"
    return "output" if noted & Role.OUTPUT else None
