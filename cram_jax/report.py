"""What a compression removed, counted."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.leaves import Leaf, described, reasons_against
from cram_jax.paths import check_masks
from cram_jax.projector import (
    Params,
    Projection,
    Projector,
    check_projector,
    check_structure,
)


@dataclass(frozen=True)
class LeafSparsity:
    """One line of a report.

    Attributes:
      path: the leaf's path, such as ``"encoder/dense/kernel"``.
      shape: its shape.
      size: its number of entries.
      kept: how many of them are kept.
      bytes: its size in memory.
      note: why it is dense, if it is, or which axes the projector had to assume.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    kept: int
    bytes: int
    note: str

    @property
    def sparsity(self) -> float:
        """Share of zeros, between 0 and 1."""
        return _sparsity(self.kept, self.size)

    @property
    def packed_bytes(self) -> int:
        """Its size as kept values and a bitmap, or dense if that is smaller."""
        values = self.kept * self.bytes // max(self.size, 1)
        return min(self.bytes, values + (self.size + 7) // 8)


@dataclass(frozen=True)
class SparsityReport:
    """Sparsity of each leaf and of all together; ``str()`` gives a table.

    Attributes:
      leaves: one entry for each leaf, in the order of ``jax.tree.leaves``.
    """

    leaves: tuple[LeafSparsity, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def kept(self) -> int:
        """Number of entries that are kept."""
        return sum(leaf.kept for leaf in self.leaves)

    @property
    def sparsity(self) -> float:
        """Share of zeros, between 0 and 1."""
        return _sparsity(self.kept, self.size)

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(leaf.bytes for leaf in self.leaves)

    @property
    def packed_bytes(self) -> int:
        """Size with each leaf packed, see `LeafSparsity.packed_bytes`."""
        return sum(leaf.packed_bytes for leaf in self.leaves)

    def __str__(self) -> str:
        header = ("leaf", "shape", "entries", "kept", "sparsity", "bytes", "packed", "")
        rows = [
            (leaf.path, "x".join(map(str, leaf.shape)), *_figures(leaf), leaf.note)
            for leaf in self.leaves
        ]
        return _table([header, *rows, ("total", "", *_figures(self), "")])


def sparsity_report(
    params: Params, masks: Params | None = None, projector: Projector | None = None
) -> SparsityReport:
    """Counts what is kept of each leaf, and the bytes that this could save.

    Zeros save nothing by themselves: "packed" is the size of the kept values plus one
    bit for every entry, in a format or engine that stores them so.

    Args:
      params: a pytree of arrays.
      masks: from `compress`, True where an entry is kept. By default the zeros of
        leaves that are `prunable` by default count as removed: a bias of zeros is not
        sparse.
      projector: what compressed them. It knows why a leaf is dense, and which axes it
        had to assume.

    Returns:
      The report. Leaves that were left dense have a note.

    Raises:
      TypeError: a mask is not bool, or the projector is not a projector.
      ValueError: the masks do not have the structure of the parameters.

    Example:
      >>> kernel = jnp.array([[1.0, -4.0], [2.0, 3.0]])
      >>> params = {"bias": jnp.zeros(2), "kernel": kernel}
      >>> projector = top_k(0.5)
      >>> print(sparsity_report(*compress(params, projector), projector))
      leaf   shape entries kept sparsity bytes packed
      bias       2       2    2   0.00 %     8      8 dense: fewer than 2 dimensions
      kernel   2x2       4    2  50.00 %    16      9
      total              6    4  33.33 %    24     17
    """
    if isinstance(params, Projection):
        raise TypeError(
            "params must be a pytree of arrays, got a Projection; pass both of its "
            "parts: sparsity_report(*compress(...))"
        )
    leaves = described(params, None)
    reasons = reasons_against(params, leaves, None)
    if masks is None:
        kept = [
            jnp.size(leaf.value) if reason else _total(jnp.asarray(leaf.value) != 0)
            for leaf, reason in zip(leaves, reasons, strict=True)
        ]
    else:
        check_structure("masks", masks, params)
        check_masks("masks", masks, params)
        kept = [_total(mask) for mask in jax.tree.leaves(masks)]
    if projector is not None:
        check_projector("projector", projector)
        reasons = projector.notes(params)
    return SparsityReport(tuple(map(_count, leaves, kept, reasons)))


def _total(mask: jax.Array) -> int:
    """How many are True, of which there may be more than an int32 holds."""
    rows = jnp.sum(jnp.atleast_1d(mask), axis=-1)
    return int(np.asarray(rows).sum(dtype=np.int64))


def _count(leaf: Leaf, kept: int, reason: str) -> LeafSparsity:
    size = jnp.size(leaf.value)
    if kept == size:
        reason = f"dense: {reason}" if reason else "dense"
    elif not reason.startswith("assumed"):
        reason = ""
    nbytes = size * jnp.result_type(leaf.value).itemsize
    return LeafSparsity(leaf.path, jnp.shape(leaf.value), size, kept, nbytes, reason)


def _sparsity(kept: int, size: int) -> float:
    return 1 - kept / size if size else 0.0


def _figures(counts: LeafSparsity | SparsityReport) -> tuple[str, ...]:
    return (
        f"{counts.size:,}",
        f"{counts.kept:,}",
        f"{100 * counts.sparsity:.2f} %",
        f"{counts.bytes:,}",
        f"{counts.packed_bytes:,}",
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " ".join(
            cell.ljust(width) if index in (0, len(row) - 1) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
