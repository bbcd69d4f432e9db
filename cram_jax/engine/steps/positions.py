"""Steps that combine or choose positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cram_jax.engine import kernels
from cram_jax.engine.buffers import Buffer
from cram_jax.engine.graph import Node
from cram_jax.engine.model import Range
from cram_jax.engine.operations import AvgPool, MaxPool, Token, window_pads

if TYPE_CHECKING:
    from cram_jax.engine.plan import Builder

_LARGEST_TABLE = 2**28
"""Entries of the table of what windows read, four bytes each."""


def emit_pool(b: Builder, node: Node) -> None:
    """Maximum or mean of windows."""
    part = node.operation
    assert isinstance(part, MaxPool)
    is_mean = isinstance(part, AvgPool)
    is_byte = b.model.forms[node.name] == {"u8"} and not is_mean
    form = "u8" if is_byte else "f32"
    x, y = b.operand(node.inputs[0], form), b.output(node.name, form)
    height, width = b.layout.sizes[node.inputs[0]]
    size = b.layout.sizes[node.name]
    pads = window_pads(part, b.types[node.inputs[0]])
    window, strides = part.window, part.strides
    assert isinstance(window, tuple)
    assert isinstance(strides, tuple)
    entries = window[0] * window[1] * y.grid.stride
    if entries > _LARGEST_TABLE:
        raise ValueError(
            f"batch, image or window {window} is too large for node {node.name!r}: its "
            f"windows would read {entries} positions, at most {_LARGEST_TABLE}"
        )
    taps = [(i, j) for i in range(window[0]) for j in range(window[1])]
    rows, columns = (
        np.arange(size[axis]) * strides[axis] - pads[axis][0] for axis in (0, 1)
    )
    places = x.grid.places((height, width))
    index = np.zeros((len(taps), x.grid.batch, *size), np.int32)
    weight = np.zeros(index.shape, np.float32)
    for number, (i, j) in enumerate(taps):
        row, column = rows[:, None] + i, columns[None] + j
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        weight[number] = inside / len(taps)
        # Padding never wins: a position inside the window is read twice instead.
        index[number] = places[
            :, np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)
        ]
    b.add(
        node,
        kernels.Pool("mean" if is_mean else "max_u8" if is_byte else "max"),
        b.share(x.rows),
        [x],
        [y],
        x=x.address,
        y=y.address,
        index=y.grid.spread(index, size),
        weight=y.grid.spread(weight, size) if is_mean else 0,
        mask=y.grid.mask(size),
        taps=len(taps),
        columns=y.grid.stride,
        x_stride=x.grid.stride,
        stride=y.grid.stride,
        rows=x.rows,
        vectors=y.grid.vectors,
        fill=y.fill,
    )
    b.finish(node)


def emit_mean(b: Builder, node: Node) -> None:
    """The mean over positions."""
    name = node.inputs[0]
    form = "f32" if "f32" in b.model.forms[name] else "u8"
    x, y = b.operand(name, form), b.output(node.name, "f32")
    height, width = b.layout.sizes[name]
    columns = height * x.grid.pitch
    what = b.range_of(name) if form == "u8" else Range(1.0, 0)
    b.add(
        node,
        kernels.MeanOfImages(form == "u8"),
        b.share(x.rows),
        [x],
        [y],
        x=x.address,
        y=y.address,
        x_stride=x.grid.stride,
        stride=y.grid.stride,
        rows=x.rows,
        items=x.grid.batch,
        item=x.grid.item,
        columns=columns,
        scale=np.float32(what.scale / (height * width)),
        pad=float(what.zero * columns),
    )
    b.finish(node)


def emit_flatten(b: Builder, node: Node) -> None:
    """Positions as features."""
    x = b.operand(node.inputs[0])
    height, width = b.layout.sizes[node.inputs[0]]
    channels = b.types[node.inputs[0]].features
    places = x.grid.places((height, width))[0]
    base = places[..., None] + np.arange(channels) * x.grid.stride
    _add_gather(b, node, x, base.ravel(), np.arange(x.grid.batch) * x.grid.item)


def emit_token(b: Builder, node: Node) -> None:
    """One token of every sequence."""
    assert isinstance(node.operation, Token)
    index = node.operation.index
    if index >= b.length:
        raise ValueError(
            f"length must be above {index} (node {node.name!r}), got {b.length}"
        )
    x = b.operand(node.inputs[0])
    base = np.arange(b.types[node.name].features) * x.grid.stride
    _add_gather(b, node, x, base, np.arange(x.grid.batch) * x.grid.item + index)


def _add_gather(
    b: Builder, node: Node, x: Buffer, base: np.ndarray, index: np.ndarray
) -> None:
    y = b.output(node.name, "f32")
    b.add(
        node,
        kernels.Gather(),
        b.share(len(base)),
        [x],
        [y],
        x=x.address,
        y=y.address,
        base=base.astype(np.int32),
        index=y.grid.spread(index.astype(np.int32).reshape(-1, 1, 1), (1, 1)),
        mask=y.grid.mask((1, 1)),
        stride=y.grid.stride,
        rows=len(base),
        vectors=y.grid.vectors,
    )
    b.finish(node)
