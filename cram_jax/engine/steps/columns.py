"""Steps that compute each column separately."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cram_jax.engine import kernels
from cram_jax.engine.buffers import tiles_of
from cram_jax.engine.fusion import ACTIVATIONS
from cram_jax.engine.graph import Node
from cram_jax.engine.model import Range
from cram_jax.engine.operations import Add, Affine, LayerNorm

if TYPE_CHECKING:
    from cram_jax.engine.plan import Builder


def emit_layer_norm(b: Builder, node: Node) -> None:
    """Layer norm, as floats, as bytes or both."""
    part = node.operation
    assert isinstance(part, LayerNorm)
    forms = b.model.forms[node.name]
    x = b.operand(node.inputs[0])
    y, octets = (
        b.output(node.name, form) if form in forms else None for form in ("f32", "u8")
    )
    what = b.range_of(node.name) if octets else Range(1.0, 0)
    writes = [buffer for buffer in (y, octets) if buffer]
    features = len(part.scale)
    for tile, count, first in tiles_of(x.grid.vectors, 2):
        b.add(
            node,
            kernels.LayerNormalise(
                tile, y is not None, octets is not None, features % 4
            ),
            count,
            [x],
            writes,
            x=x.address,
            y=y.address if y else 0,
            bytes=octets.address if octets else 0,
            scale=part.scale,
            bias=part.bias,
            features=features,
            stride=x.grid.stride,
            first=first * x.grid.lanes,
            share=np.float32(1 / features),
            epsilon=np.float32(part.epsilon),
            inverse=np.float32(1) / np.float32(what.scale),
            zero=float(what.zero),
        )


def emit_softmax(b: Builder, node: Node) -> None:
    """Softmax."""
    x, y = b.operand(node.inputs[0]), b.output(node.name, "f32")
    masked = b.masked(node.name)
    b.add(
        node,
        kernels.SoftmaxColumns(masked),
        b.share(x.grid.vectors),
        [x],
        [y],
        x=x.address,
        y=y.address,
        mask=b.mask(node.name) if masked else 0,
        features=b.types[node.name].features,
        stride=x.grid.stride,
        vectors=x.grid.vectors,
    )
    b.finish(node)


def emit_pointwise(b: Builder, node: Node) -> None:
    """A sum, an affine map or an activation on its own."""
    part = node.operation
    operands = [b.operand(name) for name in node.inputs]
    x, y = operands[0], b.output(node.name, "f32")
    affine = isinstance(part, Affine)
    is_sum = isinstance(part, Add)
    masked = b.masked(node.name)
    b.add(
        node,
        kernels.Pointwise(ACTIVATIONS.get(type(part), ""), affine, is_sum, masked),
        b.share(b.types[node.name].features),
        operands,
        [y],
        x=x.address,
        y=y.address,
        other=operands[1].address if is_sum else 0,
        scale=part.scale if isinstance(part, Affine) else 0,
        offset=part.offset if isinstance(part, Affine) else 0,
        mask=b.mask(node.name) if masked else 0,
        rows=b.types[node.name].features,
        stride=x.grid.stride,
        vectors=x.grid.vectors,
    )
    b.finish(node)
