"""Steps of attention, of floats and of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cram_jax.engine import kernels
from cram_jax.engine.buffers import aligned, tiles_of
from cram_jax.engine.graph import Node
from cram_jax.engine.model import IntegerAttention, Range
from cram_jax.engine.operations import Attention
from cram_jax.engine.packing import round_up

if TYPE_CHECKING:
    from cram_jax.engine.plan import Builder


def emit_attention(b: Builder, node: Node) -> None:
    """Attention, some queries of a head at a time."""
    part = node.operation
    assert isinstance(part, Attention)
    query, key, value = (b.operand(name) for name in node.inputs[:3])
    masks = [b.operand(name) for name in node.inputs[3:]]
    depth = b.types[node.name].features // part.heads
    octets = b.model.forms[node.name] == {"u8"}
    y = b.output(node.name, "u8" if octets else "f32")
    grid = query.grid
    largest = 4 if b.target.registers == 32 else 2
    what = b.range_of(node.name) if octets else Range(1.0, 0)
    for tile, count, first in tiles_of(grid.item // grid.lanes, largest):
        width = tile * grid.lanes
        size = round_up(b.length * width, 16)
        b.add(
            node,
            kernels.Attend(tile, 4, bool(masks), octets),
            grid.batch * part.heads * count,
            [query, key, value, *masks],
            [y],
            query=query.address,
            key=key.address,
            value=value.address,
            mask=masks[0].address if masks else 0,
            y=y.address,
            scratch=aligned(size * b.threads, np.float32),
            scratch_size=size,
            stride=grid.stride,
            item=grid.item,
            length=b.length,
            heads=part.heads,
            depth=depth,
            first=first * grid.lanes,
            parts=count,
            scale=np.float32(depth**-0.5),
            inverse=np.float32(1) / np.float32(what.scale),
            zero=float(what.zero),
        )
        step = b.steps[-1]
        step.multiply_adds = 2 * step.jobs * width * b.length * depth
    b.finish(node)


def emit_integer_attention(b: Builder, node: Node) -> None:
    """Attention of bytes: keys and values are prepared once for all queries."""
    part = node.operation
    assert isinstance(part, IntegerAttention)
    query, key, value = (b.operand(name, "u8") for name in node.inputs[:3])
    query_range, key_range, value_range = (b.range_of(n) for n in node.inputs[:3])
    masks = [b.operand(name) for name in node.inputs[3:]]
    features, grid = b.types[node.name].features, query.grid
    depth, words = features // part.heads, b.target.words
    quarter = b.layout.quarter(grid)
    signed = b.allocate(words * features // 4, grid, "u8", 0)
    starts = b.allocate(part.heads, grid, "f32", 0)
    turned = b.allocate(words * features, quarter, "u8", 0)
    b.add(
        node,
        kernels.SignKeys(),
        b.share(part.heads),
        [key],
        [signed, starts],
        key=key.address,
        y=signed.address,
        starts=starts.address,
        stride=grid.stride,
        vectors=grid.vectors,
        heads=part.heads,
        units=depth // 4,
        query_zero=query_range.zero,
    )
    b.add(
        node,
        kernels.TransposeValues(),
        b.share(features // 4),
        [value],
        [turned],
        value=value.address,
        y=turned.address,
        stride=grid.stride,
        quarter=quarter.stride,
        vectors=quarter.vectors,
        units=features // 4,
    )
    octets = b.model.forms[node.name] == {"u8"}
    y = b.output(node.name, "u8" if octets else "f32")
    result = b.range_of(node.name) if octets else Range(1.0, 0)
    unit = value_range.scale / result.scale
    groups = -(-b.length // 4)
    for tile, count, first in tiles_of(
        grid.item // grid.lanes, 4 if b.target.registers == 32 else 2
    ):
        width = tile * grid.lanes
        size = round_up(5 * groups * width, 16)  # four floats and four bytes each
        b.add(
            node,
            kernels.AttendBytes(tile, bool(masks), octets),
            grid.batch * part.heads * count,
            [query, signed, starts, turned, *masks],
            [y],
            query=query.address,
            key=signed.address,
            starts=starts.address,
            value=turned.address,
            mask=masks[0].address if masks else 0,
            y=y.address,
            scratch=aligned(size * b.threads, np.float32),
            scratch_size=size,
            stride=grid.stride,
            quarter=quarter.stride,
            item=grid.item,
            length=b.length,
            heads=part.heads,
            depth=depth,
            first=first * grid.lanes,
            parts=count,
            scale=np.float32(query_range.scale * key_range.scale * depth**-0.5),
            unit=np.float32(unit),
            offset=np.float32((128 - value_range.zero) * unit + result.zero),
        )
        step = b.steps[-1]
        step.multiply_adds = 2 * step.jobs * width * b.length * depth
    for buffer in (signed, starts, turned):
        b.free(buffer)
    b.finish(node)
