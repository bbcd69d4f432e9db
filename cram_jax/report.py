"""What a compression removed, counted."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cram_jax.projector import Params, check_structure, leaf_path


@dataclass(frozen=True)
class LeafSparsity:
    """One line of a report.

    Attributes:
      path: the leaf's place, such as ``"encoder/dense/kernel"``.
      shape: its shape.
      size: its number of entries.
      kept: how many of them are kept.
      bytes: its size in memory.
      note: why it is dense; empty where it is not.
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
        """Its size as kept values and a bitmap, or as it is where that is smaller."""
        values = self.kept * self.bytes // max(self.size, 1)
        return min(self.bytes, values + (self.size + 7) // 8)


@dataclass(frozen=True)
class SparsityReport:
    """Sparsity of every leaf and of all together; ``str()`` gives a table.

    Attributes:
      leaves: one entry a leaf, in the order of ``jax.tree.leaves``.
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


def sparsity_report(params: Params, masks: Params | None = None) -> SparsityReport:
    """Counts what is kept of every leaf, and the bytes that this could save.

    Zeros save nothing by themselves: "packed" is the size of the kept values plus one
    bit for every entry, in a format or engine that stores them so.

    Args:
      params: a pytree of arrays.
      masks: from `compress`, True where an entry is kept; by default the entries that
        are not zero count as kept.

    Returns:
      The report. Leaves that were left dense have a note.

    Raises:
      ValueError: the masks do not have the structure of the parameters.

    Example:
      >>> kernel = jnp.array([[1.0, -4.0], [2.0, 3.0]])
      >>> params = {"bias": jnp.zeros(2), "kernel": kernel}
      >>> print(sparsity_report(*compress(params, top_k(0.5))))
      leaf   shape entries kept sparsity bytes packed
      bias       2       2    2   0.00 %     8      8 dense: fewer than 2 dimensions
      kernel   2x2       4    2  50.00 %    16      9
      total              6    4  33.33 %    24     17
    """
    if masks is None:
        masks = jax.tree.map(lambda leaf: leaf != 0, params)
    check_structure("masks", masks, params)
    return SparsityReport(
        tuple(
            _count(leaf_path(path), leaf, mask)
            for (path, leaf), mask in zip(
                jax.tree.leaves_with_path(params), jax.tree.leaves(masks), strict=True
            )
        )
    )


def _count(path: str, leaf: jax.Array, mask: jax.Array) -> LeafSparsity:
    kept = int(jnp.sum(mask))
    note = ""
    if kept == leaf.size:
        note = "dense" if leaf.ndim >= 2 else "dense: fewer than 2 dimensions"
    return LeafSparsity(path, leaf.shape, leaf.size, kept, leaf.nbytes, note)


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
