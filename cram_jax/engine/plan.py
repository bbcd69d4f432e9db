"""A plan: a model for one batch size and length, with all its buffers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cram_jax.engine import kernels
from cram_jax.engine.buffers import Buffer, Step
from cram_jax.engine.geometry import Grid
from cram_jax.engine.graph import Node, consumers
from cram_jax.engine.layout import Layout, phase_of
from cram_jax.engine.model import Model, PackedProduct, Range
from cram_jax.engine.operations import Input, SpaceToDepth
from cram_jax.engine.packing import lanes_of, round_up
from cram_jax.engine.steps import EMITTERS
from cram_jax.engine.steps.inputs import load_input
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
            EMITTERS[type(node.operation)](self, node)
            if not keep:
                self._release(index)

    # ------------------------------------------------------------------------- buffers
    def allocate(self, rows: int, grid: Grid, form: str, fill: int) -> Buffer:
        """A buffer, perhaps one that is no longer read."""
        free = self._free.get((rows, id(grid), form, fill))
        return free.pop() if free else Buffer(rows, grid, form, fill)

    def free(self, buffer: Buffer) -> None:
        """Returns a buffer that no later step reads."""
        self._free.setdefault(buffer.key, []).append(buffer)

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
                self.free(self.buffers.pop((name, form)))
        for key in [k for k in self._phases if self.layout.last_read[k[0]] == index]:
            self.free(self._phases.pop(key)[0])

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
        step = Step(name, spec, words, jobs, tuple(reads), tuple(writes), nbytes=nbytes)
        self.steps.append(step)

    def share(self, total: int) -> int:
        """Jobs for so many equal pieces of work."""
        return min(total, 4 * self.threads) if self.threads > 1 else 1

    def finish(self, node: Node) -> None:
        """Adds a copy in bytes to a result in floats, if something reads it."""
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
        clash |= set() if same and writes <= written else writes & written
        if group and clash:
            yield group
            group, read, written = [], set(), set()
        group.append(step)
        read |= reads
        written |= writes
    if group:
        yield group
