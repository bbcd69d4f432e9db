"""The steps of a product: its weights, offsets and constants bound to buffers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cram_jax.engine import kernels
from cram_jax.engine.buffers import Buffer, Step, tiles_of
from cram_jax.engine.graph import Node
from cram_jax.engine.layout import phase_of
from cram_jax.engine.model import PackedProduct, Range
from cram_jax.engine.packing import round_up

if TYPE_CHECKING:
    from cram_jax.engine.plan import Builder


def emit_product(b: Builder, node: Node) -> None:
    """Adds the steps of one product: its columns, in tiles of one or two widths."""
    product = node.operation
    assert isinstance(product, PackedProduct)
    weights = product.weights
    terms = weights.terms(b.target)
    x, offsets = _offsets(b, node, product)
    octets = b.model.forms[node.name] == {"u8"}
    residual, residual_form = _residual(b, node)
    y = b.output(node.name, "u8" if octets else "f32")
    constants = product_constants(
        node.name,
        product,
        b.range_of(node.inputs[0]) if weights.int8 else None,
        b.range_of(node.name) if octets else None,
        b.range_of(node.inputs[1]) if residual_form == "u8" else None,
    )
    masked = b.masked(node.name)
    spec = kernels.SparseProduct(
        weights.int8,
        weights.rows,
        1,
        "u8" if octets else "f32",
        residual_form,  # type: ignore[arg-type]
        product.activation,
        bool(constants["zero"]),
        masked,
    )
    words = dict(
        x=x.address,
        ends=terms.ends,
        offsets=offsets[terms.positions],
        weights=terms.words,
        y=y.address,
        residual=residual.address if residual else 0,
        mask=b.mask(node.name) if masked else 0,
        stride=y.grid.stride,
        units=weights.padded_outputs // kernels.UNIT,
        fill=y.fill,
        **constants,
    )
    _add_tiled(b, node, spec, words, [x] if residual is None else [x, residual], y)


def _add_tiled(
    b: Builder,
    node: Node,
    spec: kernels.SparseProduct,
    words: dict[str, object],
    reads: list[Buffer],
    y: Buffer,
) -> None:
    """The steps for the tile that the plan was given."""
    product = node.operation
    assert isinstance(product, PackedProduct)
    weights, vectors = product.weights, y.grid.vectors
    tile = b.tiles(node.name, spec, vectors)
    parts = -(-vectors // tile)
    units = weights.padded_outputs // kernels.UNIT
    for size, count, first in tiles_of(vectors, tile):
        # Every thread gets equally many jobs.
        even = b.threads // math.gcd(count, b.threads)
        chunks = min(units, round_up(-(-4 * b.threads // parts), even))
        chunks = chunks if b.threads > 1 else 1
        share = count * size / vectors
        columns = count * size * y.grid.lanes
        b.steps.append(
            Step(
                node.name,
                kernels.SparseProduct(**{**vars(spec), "tile": size}),
                {**words, "first": first * y.grid.lanes, "chunks": chunks},
                count * chunks,
                tuple(reads),
                (y,),
                multiply_adds=weights.values.size * columns,
                nbytes=int(
                    share * sum(buffer.nbytes for buffer in (*reads, y))
                    + count * weights.values.nbytes
                ),
            )
        )
    b.finish(node)


def product_constants(
    name: str,
    product: PackedProduct,
    x: Range | None,
    y: Range | None,
    residual: Range | None,
) -> dict[str, object]:
    """What a product's kernel needs besides weights: bias, scales and zero points.

    In INT8 the sum starts at the bias in units of the product of scales, less what the
    zero point of x adds; the result is ``sum * scale``. If the output is bytes and its
    activation is clipping, the scale is already that of the output.

    Args:
      name: of the node, for errors.
      product: the layer.
      x: range of the input, or None in float32.
      y: range of the output if it is bytes.
      residual: range of the residual if it is bytes.

    Returns:
      Arguments of `SparseProduct` by name.

    Raises:
      ValueError: a sum of integers may exceed 32 bits.
    """
    weights = product.weights
    rows = weights.padded_outputs
    bias = np.zeros(rows, np.float64)
    bias[: weights.outputs] = product.bias
    if x is None:
        return {"bias": bias.astype(np.float32), "scale": 0, "zero": 0.0, "low": 0.0}
    assert weights.scale is not None
    scale = np.ones(rows, np.float64)
    scale[: weights.outputs] = weights.scale.astype(np.float64) * x.scale
    if residual is not None:
        bias -= residual.scale * residual.zero
    # A row of zeros may have any scale: take one that makes its bias small enough.
    empty = weights.absolute_sums() == 0
    scale[empty] = np.maximum(np.abs(bias[empty]) / 2**24, 1e-30)
    start = np.rint(bias / scale) - x.zero * weights.sums()
    # On the way there a sum may wrap around.
    highest = start + 255 * (weights.absolute_sums() + weights.sums()) / 2
    lowest = start - 255 * (weights.absolute_sums() - weights.sums()) / 2
    if np.abs([start, highest, lowest]).max() >= 2**31:
        raise ValueError(
            f"node {name!r}: a sum of integers exceeds 32 bits; the scale of its "
            f"weights is too small for its bias"
        )
    folded = y is not None and product.activation in ("", "relu")
    residual_scale = 1.0 if residual is None else residual.scale
    if folded:
        assert y is not None
        scale, residual_scale = scale / y.scale, residual_scale / y.scale
    zero = float(y.zero) if y is not None else 0.0
    return {
        "bias": start.astype(np.int32),
        "scale": scale.astype(np.float32),
        "residual_scale": np.float32(residual_scale),
        "inverse": np.float32(1) / np.float32(1 if y is None else y.scale),
        "zero": zero,
        "low": zero if product.activation == "relu" else 0.0,
    }


def _residual(b: Builder, node: Node) -> tuple[Buffer | None, str]:
    if len(node.inputs) == 1:
        return None, ""
    name = node.inputs[1]
    form = "f32" if "f32" in b.model.forms[name] else "u8"
    return b.operand(name, form), form


def _offsets(
    b: Builder, node: Node, product: PackedProduct
) -> tuple[Buffer, np.ndarray]:
    """The buffer that a product reads, and the first lane of every position."""
    weights = product.weights
    grid = b.layout.grids[node.name]
    taps = phase_of(product)
    if product.strides == (1, 1):
        x = b.operand(node.inputs[0], "u8" if weights.int8 else "f32")
        phases = [(0, 0)]
    else:
        x, phases = b.phases(node.inputs[0], product, grid)
    of_tap = [
        phases.index(phase) * weights.lanes * grid.stride + rows * grid.pitch + columns
        for phase, (rows, columns) in taps
    ]
    lanes = np.arange(weights.lanes)[:, None] * grid.stride
    every = (lanes + np.asarray(of_tap)).ravel()
    if np.abs(every).max() >= 2**31:
        raise ValueError(f"batch is too large for node {node.name!r}")
    return x, every.astype(np.int32)
