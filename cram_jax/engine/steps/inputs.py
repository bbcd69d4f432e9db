"""Steps of inputs and of tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cram_jax.engine import kernels
from cram_jax.engine.buffers import Buffer
from cram_jax.engine.fusion import Lookup
from cram_jax.engine.graph import Node
from cram_jax.engine.model import PackedProduct, Range
from cram_jax.engine.operations import AddPositions, SpaceToDepth

if TYPE_CHECKING:
    from cram_jax.engine.plan import Builder


def load_input(
    b: Builder,
    name: str,
    y: Buffer,
    address: int,
    rows: np.ndarray,
    columns: np.ndarray,
) -> None:
    """Adds the step that copies rows and columns of an input."""
    staging = b.staging[name]
    batch, height, width, channels = staging.shape
    places = np.arange(batch)[:, None, None] * height + rows[:, None]
    index = (places * width + columns) * channels
    size = (len(rows), len(columns))
    what = b.range_of(name) if y.form == "u8" else Range(1.0, 0)
    b.add(
        name,
        kernels.LoadInput(y.form == "u8"),
        b.share(y.grid.vectors),
        [],
        [y],
        x=staging,
        y=address,
        index=y.grid.spread(index.astype(np.int32), size),
        mask=y.grid.mask(size),
        channels=channels,
        stride=y.grid.stride,
        vectors=y.grid.vectors,
        inverse=np.float32(1) / np.float32(what.scale),
        zero=float(what.zero),
        fill=y.fill,
    )


def emit_input(b: Builder, node: Node) -> None:
    """Copies an input to its grid, in every form that is read."""
    kind = b.types[node.name]
    grid = b.layout.grids[node.name]
    if kind.dtype == "int32":
        b.buffers[node.name, "f32"] = Buffer(1, grid, "f32", 0)
        return
    height, width = b.layout.sizes[node.name]
    shape = (grid.batch, height, width, kind.features)
    if int(np.prod(shape)) >= 2**31:
        raise ValueError(f"batch is too large: input {node.name!r} has shape {shape}")
    b.staging[node.name] = np.zeros(shape, np.float32)
    readers = b.readers[node.name]
    is_read = node.name in b.graph.outputs or not readers
    if not is_read and all(_reads_staging(reader, node.name) for reader in readers):
        return
    for form in sorted(b.model.forms[node.name]):
        y = b.output(node.name, form)
        load_input(b, node.name, y, y.address, np.arange(height), np.arange(width))


def _reads_staging(reader: Node, name: str) -> bool:
    part = reader.operation
    if isinstance(part, SpaceToDepth):
        return True
    return (
        isinstance(part, PackedProduct)
        and part.strides != (1, 1)
        and name not in reader.inputs[1:]
    )


def emit_lookup(b: Builder, node: Node) -> None:
    """Rows of a table."""
    assert isinstance(node.operation, Lookup)
    ids = b.operand(node.inputs[0])
    residual = b.operand(node.inputs[1]) if len(node.inputs) > 1 else None
    _add_lookup(b, node, ids, node.operation.table, residual)


def emit_positions(b: Builder, node: Node) -> None:
    """Rows of a table by position."""
    assert isinstance(node.operation, AddPositions)
    grid = b.layout.grids[node.name]
    if b.length > len(node.operation.table):
        raise ValueError(
            f"length must be at most {len(node.operation.table)} (node {node.name!r}), "
            f"got {b.length}"
        )
    ids = Buffer(1, grid, "f32", 0)
    ids.lanes()[0] = grid.spread(
        np.broadcast_to(np.arange(b.length, dtype=np.int32), (grid.batch, 1, b.length)),
        (1, b.length),
    )
    _add_lookup(b, node, ids, node.operation.table, b.operand(node.inputs[0]))


def _add_lookup(
    b: Builder, node: Node, ids: Buffer, table: np.ndarray, residual: Buffer | None
) -> None:
    y = b.output(node.name, "f32")
    b.add(
        node,
        kernels.Embed(residual is not None),
        b.share(y.grid.vectors),
        [ids] if residual is None else [ids, residual],
        [y],
        ids=ids.address,
        table=table,
        y=y.address,
        residual=0 if residual is None else residual.address,
        features=table.shape[1],
        stride=y.grid.stride,
        vectors=y.grid.vectors,
    )
    b.finish(node)
