"""A plan: a model for one batch size and length, with all its buffers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cram_jax.engine import kernels
from cram_jax.engine.buffers import Buffer, Step, aligned, tiles_of
from cram_jax.engine.fusion import ACTIVATIONS, Lookup
from cram_jax.engine.geometry import Grid
from cram_jax.engine.graph import (
    Add,
    AddPositions,
    Affine,
    Attention,
    AvgPool,
    Flatten,
    Gelu,
    Input,
    LayerNorm,
    MaxPool,
    Mean,
    Node,
    Relu,
    Softmax,
    SpaceToDepth,
    Tanh,
    Token,
    consumers,
    window_pads,
)
from cram_jax.engine.layout import Layout, phase_of
from cram_jax.engine.model import Model, PackedProduct, Range
from cram_jax.engine.packing import lanes_of, round_up
from cram_jax.engine.products import product_steps
from cram_jax.engine.targets import Target

Tiles = Callable[[str, kernels.SparseProduct, int], int]
"""From a node, its kernel and the vectors of columns to the vectors of a tile."""


class Builder:
    """Turns the nodes of a model into steps and buffers."""

    def __init__(
        self,
        model: Model,
        target: Target,
        batch: int,
        length: int,
        threads: int,
        tiles: Tiles,
        keep: bool,
    ):
        self.model, self.target, self.threads = model, target, threads
        self.graph, self.types = model.graph, model.graph.types
        self.length, self.tiles, self.keep = length, tiles, keep
        self.layout = Layout(model.graph, target.lanes, batch, length)
        self.readers = consumers(model.graph)
        self.steps: list[Step] = []
        self.staging: dict[str, np.ndarray] = {}
        self.buffers: dict[tuple[str, str], Buffer] = {}
        self._phases: dict[tuple[Any, ...], tuple[Buffer, list[tuple[int, int]]]] = {}
        self._free: dict[tuple[Any, ...], list[Buffer]] = {}
        for index, node in enumerate(self.graph.nodes):
            emit = _EMITTERS[type(node.operation)]
            emit(self, node)
            if not keep:
                self._release(index)

    # ------------------------------------------------------------------------- buffers
    def allocate(self, rows: int, grid: Grid, form: str, fill: int) -> Buffer:
        """A buffer, perhaps one that is no longer read."""
        free = self._free.get((rows, id(grid), form, fill))
        return free.pop() if free else Buffer(rows, grid, form, fill)

    def output(self, name: str, form: str) -> Buffer:
        """A new buffer for the result of a node."""
        channels = self.types[name].features
        is_byte = form == "u8"
        rows = lanes_of(channels, True) if is_byte else round_up(channels, 4)
        fill = fill_of(self.model.ranges[name]) if is_byte else 0
        buffer = self.allocate(rows, self.layout.grids[name], form, fill)
        self.buffers[name, form] = buffer
        return buffer

    def operand(self, name: str, form: str = "f32") -> Buffer:
        """The buffer of a result that was computed before."""
        return self.buffers[name, form]

    def range_of(self, name: str) -> Range:
        """What a byte of a tensor stands for."""
        return self.model.ranges[name]

    def masked(self, name: str) -> bool:
        """Whether columns of a node's grid are padding."""
        return self.layout.masked(name)

    def mask(self, name: str) -> np.ndarray:
        """-1 for the columns of a node's result, 0 for padding."""
        return self.layout.grids[name].mask(self.layout.sizes[name])

    def _release(self, index: int) -> None:
        """Frees buffers whose last reader was the node of this index."""
        for name, form in list(self.buffers):
            last = self.layout.last_read[name]
            is_int = self.types[name].dtype == "int32"
            if last == index and name not in self.graph.outputs and not is_int:
                buffer = self.buffers.pop((name, form))
                self._free.setdefault(buffer.key, []).append(buffer)
        for key in [k for k in self._phases if self.layout.last_read[k[0]] == index]:
            buffer, _ = self._phases.pop(key)
            self._free.setdefault(buffer.key, []).append(buffer)

    # --------------------------------------------------------------------------- steps
    def add(
        self,
        node: Node | str,
        spec: kernels.KernelSpec,
        jobs: int,
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
        **words: Any,
    ) -> None:
        """Adds one step; ``jobs`` becomes one of its arguments."""
        name = node if isinstance(node, str) else node.name
        nbytes = sum(buffer.nbytes for buffer in (*reads, *writes))
        words = {"jobs": jobs, **words}
        step = Step(
            name, spec, words, jobs, tuple(reads), tuple(writes), nbytes=nbytes
        )
        self.steps.append(step)

    def share(self, total: int) -> int:
        """Jobs for so many equal pieces of work."""
        return min(total, 4 * self.threads) if self.threads > 1 else 1

    def finish(self, node: Node) -> None:
        """Adds bytes to a result of floats, if something reads them."""
        if "u8" not in self.model.forms[node.name]:
            return
        if (node.name, "u8") in self.buffers:
            return
        x, y = self.operand(node.name), self.output(node.name, "u8")
        what = self.range_of(node.name)
        channels = self.types[node.name].features
        masked = self.masked(node.name)
        self.add(
            node,
            kernels.Quantise(channels % 4, masked),
            self.share(x.grid.vectors),
            [x],
            [y],
            x=x.address,
            y=y.address,
            mask=self.mask(node.name) if masked else 0,
            stride=x.grid.stride,
            units=channels // 4,
            vectors=x.grid.vectors,
            inverse=np.float32(1) / np.float32(what.scale),
            zero=float(what.zero),
            fill=y.fill,
        )

    def phases(
        self, name: str, product: PackedProduct, grid: Grid
    ) -> tuple[Buffer, list[tuple[int, int]]]:
        """A tensor's positions (row, column) modulo the strides, each on a grid.

        Returns:
          The buffer, phase after phase, and which phases those are.
        """
        form = "u8" if self.model.int8 else "f32"
        key = (name, product.strides, id(grid))
        if key not in self._phases:
            wanted = dict.fromkeys(
                phase
                for reader in self.readers[name]
                if isinstance(reader.operation, PackedProduct)
                and reader.operation.strides == product.strides
                and self.layout.grids[reader.name] is grid
                and reader.inputs[0] == name
                for phase, _ in phase_of(reader.operation)
            )
            fill = fill_of(self.range_of(name)) if self.model.int8 else 0
            rows = len(wanted) * lanes_of(self.types[name].features, form == "u8")
            buffer = self.allocate(rows, grid, form, fill)
            for number, phase in enumerate(wanted):
                self._fill_phase(name, product.strides, phase, number, buffer)
            self._phases[key] = buffer, list(wanted)
        return self._phases[key]

    def _fill_phase(
        self,
        name: str,
        strides: tuple[int, int],
        phase: tuple[int, int],
        number: int,
        y: Buffer,
    ) -> None:
        height, width = self.layout.sizes[name]
        rows = np.arange(phase[0], height, strides[0])
        columns = np.arange(phase[1], width, strides[1])
        size = (len(rows), len(columns))
        lanes = lanes_of(self.types[name].features, y.form == "u8")
        address = y.address + 4 * number * lanes * y.grid.stride
        if isinstance(self.graph[name].operation, Input | SpaceToDepth):
            load_input(self, name, y, address, rows, columns)
            return
        x = self.operand(name, y.form)
        places = x.grid.places((height, width))[:, rows][:, :, columns]
        self.add(
            name,
            kernels.Gather(),
            self.share(lanes),
            [x],
            [y],
            x=x.address,
            y=address,
            base=np.arange(lanes, dtype=np.int32) * np.int32(x.grid.stride),
            index=y.grid.spread(places.astype(np.int32), size),
            mask=y.grid.mask(size),
            stride=y.grid.stride,
            rows=lanes,
            vectors=y.grid.vectors,
            fill=y.fill,
        )


def fill_of(what: Range) -> int:
    """The zero point in all four bytes of a lane."""
    return what.zero * 0x01010101


# --------------------------------------------------------------------- inputs and tables
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


def _emit_input(b: Builder, node: Node) -> None:
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
    if readers and all(_reads_staging(reader, node.name) for reader in readers):
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


def _emit_lookup(b: Builder, node: Node) -> None:
    assert isinstance(node.operation, Lookup)
    ids = b.operand(node.inputs[0])
    residual = b.operand(node.inputs[1]) if len(node.inputs) > 1 else None
    _add_lookup(b, node, ids, node.operation.table, residual)


def _emit_positions(b: Builder, node: Node) -> None:
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


# ------------------------------------------------------------------- column by column
def _emit_layer_norm(b: Builder, node: Node) -> None:
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
            kernels.LayerNormalise(tile, y is not None, octets is not None, features % 4),
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


def _emit_softmax(b: Builder, node: Node) -> None:
    x, y = b.operand(node.inputs[0]), b.output(node.name, "f32")
    b.add(
        node,
        kernels.SoftmaxColumns(),
        b.share(x.grid.vectors),
        [x],
        [y],
        x=x.address,
        y=y.address,
        features=b.types[node.name].features,
        stride=x.grid.stride,
        vectors=x.grid.vectors,
    )
    b.finish(node)


def _emit_pointwise(b: Builder, node: Node) -> None:
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


def _emit_attention(b: Builder, node: Node) -> None:
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


# --------------------------------------------------------------------------- positions
def _emit_pool(b: Builder, node: Node) -> None:
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
        # Padding never wins: instead of it, a position of the window is read twice.
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


def _emit_mean(b: Builder, node: Node) -> None:
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


def _emit_flatten(b: Builder, node: Node) -> None:
    x = b.operand(node.inputs[0])
    height, width = b.layout.sizes[node.inputs[0]]
    channels = b.types[node.inputs[0]].features
    places = x.grid.places((height, width))[0]
    base = places[..., None] + np.arange(channels) * x.grid.stride
    _add_gather(b, node, x, base.ravel(), np.arange(x.grid.batch) * x.grid.item)


def _emit_token(b: Builder, node: Node) -> None:
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


def _emit_product(b: Builder, node: Node) -> None:
    b.steps.extend(product_steps(b, node))
    b.finish(node)


_EMITTERS: dict[type, Callable[[Builder, Node], None]] = {
    Input: _emit_input,
    SpaceToDepth: _emit_input,
    PackedProduct: _emit_product,
    Lookup: _emit_lookup,
    AddPositions: _emit_positions,
    LayerNorm: _emit_layer_norm,
    Softmax: _emit_softmax,
    Attention: _emit_attention,
    MaxPool: _emit_pool,
    AvgPool: _emit_pool,
    Mean: _emit_mean,
    Flatten: _emit_flatten,
    Token: _emit_token,
    **dict.fromkeys((Add, Affine, Relu, Gelu, Tanh), _emit_pointwise),
}


def groups_of(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Neighbouring steps that do not depend on each other, and so may overlap."""
    group: list[Step] = []
    read: set[int] = set()
    written: set[int] = set()
    for step in steps:
        reads, writes = ({id(x) for x in side} for side in (step.reads, step.writes))
        same = bool(group) and group[-1].node == step.node
        # Steps of one node that write one buffer write different columns of it.
        clash = reads & written or writes & read
        clash = clash or (writes & written and not (same and writes <= written))
        if group and clash:
            yield group
            group, read, written = [], set(), set()
        group.append(step)
        read |= reads
        written |= writes
    if group:
        yield group
