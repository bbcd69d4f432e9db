"""One integer label for each position of each traced axis, and what is known of it.

An axis is a tuple of factors, outer to inner: a flattened image is (height, width,
channels), a fused projection is (heads, units). Labels of positions that can only be
removed together are united; `solve` turns the unions into classes.
"""

import bisect
import enum
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Ids: TypeAlias = np.ndarray[Any, np.dtype[np.intp]]
Kept: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
"""One bool for each group, position or label: True where it stays."""

Key: TypeAlias = tuple[Hashable, ...]
"""Where an axis comes from: the path of an equation, and a name."""

Refinements: TypeAlias = dict[Key, set[int]]
"""For an axis, the sizes of the trailing parts that reshapes split off."""


class Role(enum.IntFlag):
    """What an axis of a parameter does, as the operations that use it show."""

    NONE = 0
    INPUT = 1
    OUTPUT = 2
    STACK = 4
    LOOKUP = 8
    BATCH = 16
    WINDOW = 32
    CONTRACTED = 64
    """A contraction of two activations runs over it, or a sum."""
    KERNEL = 128
    """A contraction with an activation runs over another axis, of size 1."""


class Source(enum.IntEnum):
    """What a value was computed from; the larger one wins."""

    CONSTANT = 0
    WEIGHT = 1
    ACTIVATION = 2


class Factor(NamedTuple):
    """A part of an axis.

    Attributes:
      ids: one label for each position.
      zero: whether the value is certainly 0 wherever a removed position was masked.
    """

    ids: Ids
    zero: bool


Axis: TypeAlias = tuple[Factor, ...]
"""Factors, outer to inner; none for an axis of size 1."""


class Value(NamedTuple):
    """The labels of one traced array.

    Attributes:
      axes: one for each dimension.
      source: what it was computed from.
      literal: its value, if it is one number that the trace knows.
    """

    axes: tuple[Axis, ...]
    source: Source
    literal: Any = None

    @property
    def is_zero(self) -> bool:
        """Whether the trace knows that it is 0."""
        return self.literal is not None and bool(np.all(self.literal == 0))


class Origin(NamedTuple):
    """Where a run of labels was handed out.

    Attributes:
      first: the first label.
      size: how many there are.
      key: the axis that they belong to.
      tail: how many positions of that axis each label stands for; 0 if the run cannot
        be split.
    """

    first: int
    size: int
    key: Key
    tail: int


def axis_size(axis: Axis) -> int:
    """How many positions an axis has."""
    return math.prod(factor_sizes(axis))


def factor_sizes(axis: Axis) -> tuple[int, ...]:
    """How many positions each factor of an axis has."""
    return tuple(len(factor.ids) for factor in axis)


class Labels:
    """Hands out labels, and collects what rules learn about them.

    Args:
      refinements: how axes are split into factors. A rule that needs a finer split adds
        to it and sets ``refined``; then the trace is read once more.
    """

    def __init__(self, refinements: Refinements) -> None:
        self.refinements = refinements
        self.refined = False
        self.count = 0
        self.freezes: list[tuple[Ids, str]] = []
        self.roles: list[tuple[Ids, Role]] = []
        self._sharing: list[tuple[Ids, Ids]] = []
        self._unions: list[tuple[Ids, Ids]] = []
        self._runs: dict[tuple[Key, int], list[Ids]] = {}
        self._origins: list[Origin] = []

    def axis(
        self, key: Key, size: int, *, zero: bool = False, frozen: str | None = None
    ) -> Axis:
        """The axis of this key; asked again, the same labels."""
        if size == 1:
            return ()
        runs = self._runs.get((key, size))
        if runs is None:
            runs = self._runs[key, size] = self._hand_out(key, size)
            if frozen:
                self.freezes.extend((ids, frozen) for ids in runs)
        return tuple(Factor(ids, zero) for ids in runs)

    def run(self, key: Key, size: int, *, frozen: str | None = None) -> Ids:
        """Labels of positions that are no axis of their own; never split."""
        runs = self._runs.get((key, size))
        if runs is None:
            runs = self._runs[key, size] = [self._run(key, size, 0)]
            if frozen:
                self.freezes.append((runs[0], frozen))
        return runs[0]

    def value(
        self,
        key: Key,
        shape: Sequence[int],
        source: Source,
        *,
        zero: bool = False,
        frozen: str | None = None,
    ) -> Value:
        """A value with an axis of its own for each dimension."""
        axes = (
            self.axis((*key, dimension), size, zero=zero, frozen=frozen)
            for dimension, size in enumerate(shape)
        )
        return Value(tuple(axes), source)

    def unite(self, left: Ids, right: Ids) -> None:
        """Unites two runs: positions at the same place stay or go together."""
        if left is not right and not np.array_equal(left, right):
            self._unions.append((left, right))

    def freeze(self, axis: Iterable[Factor], reason: str) -> None:
        """Freezes an axis: none of its positions may be removed."""
        self.freezes.extend((factor.ids, reason) for factor in axis)

    def add_role(self, axis: Iterable[Factor], role: Role) -> None:
        """Notes what the axis does."""
        self.roles.extend((factor.ids, role) for factor in axis)

    def share_roles(self, axes: Sequence[Axis]) -> None:
        """Notes that weights are combined, entry by entry, before they are used."""
        for same in zip(*axes, strict=True):
            self._sharing.extend((same[0].ids, other.ids) for other in same[1:])

    def role_bits(self) -> Ids:
        """The roles of each label, with those of weights that it is combined with."""
        root = self._classes(self._sharing)
        bits: Ids = np.zeros(self.count, int)
        for ids, role in self.roles:
            np.bitwise_or.at(bits, root[ids], int(role))
        shared: Ids = bits[root]
        return shared

    def is_parameter(self, axis: Axis) -> bool:
        """Whether the labels of an axis are those of an input of the program."""
        return all(
            self._origin(int(factor.ids[0])).key[0] == "input"
            for factor in axis
            if len(factor.ids)
        )

    def is_joined(self, rows: Ids) -> bool:
        """Whether each row of labels was handed out at once, but not all rows were."""
        origins = [self._origin(int(row[0])) for row in rows]
        return len(set(origins)) > 1 and all(
            int(row[-1]) < origin.first + origin.size and (np.diff(row) == 1).all()
            for row, origin in zip(rows, origins, strict=True)
        )

    def refine(self, ids: Ids, inner: int) -> bool:
        """Asks that the axis of these labels be split after every ``inner`` of them.

        Returns:
          Whether it can be: the labels are a run of one axis, cut at whole parts, and
          the split nests with those that were asked for before.
        """
        origin = self._origin(int(ids[0]))
        offset = int(ids[0]) - origin.first
        is_run = offset + len(ids) <= origin.size and np.array_equal(
            ids, np.arange(ids[0], ids[0] + len(ids))
        )
        if not is_run or not origin.tail or offset % inner or origin.size % inner:
            return False
        tail = origin.tail * inner
        tails = self.refinements.setdefault(origin.key, set())
        if any(tail % other and other % tail for other in tails):
            return False
        tails.add(tail)
        self.refined = True
        return True

    def solve(self) -> Ids:
        """The smallest label of each label's class."""
        return self._classes(self._unions)

    def _classes(self, pairs: Sequence[tuple[Ids, Ids]]) -> Ids:
        root: Ids = np.arange(self.count)
        if not pairs:
            return root
        left = np.concatenate([a for a, _ in pairs])
        right = np.concatenate([b for _, b in pairs])
        while True:
            low = np.minimum(root[left], root[right])
            new = root.copy()
            for ends in (root[left], root[right], left, right):
                np.minimum.at(new, ends, low)
            new = new[new]
            if np.array_equal(new, root):
                return root
            root = new

    def _hand_out(self, key: Key, size: int) -> list[Ids]:
        if size == 0:
            return [self._run(key, 0, 0)]
        cuts, above = [], size
        for tail in sorted(self.refinements.get(key, ()), reverse=True):
            if tail < above and above % tail == 0:
                cuts.append(above // tail)
                above = tail
        runs, tail = [], size
        for part in (*cuts, above):
            tail //= part
            runs.append(self._run(key, part, tail))
        return runs

    def _run(self, key: Key, size: int, tail: int) -> Ids:
        self._origins.append(Origin(self.count, size, key, tail))
        ids: Ids = np.arange(self.count, self.count + size)
        self.count += size
        return ids

    def _origin(self, label: int) -> Origin:
        place = bisect.bisect_right(self._origins, label, key=lambda o: o.first)
        return self._origins[place - 1]
