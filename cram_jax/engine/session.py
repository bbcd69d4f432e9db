"""A plan with its program, its inputs and its outputs."""

import numpy as np

from cram_jax.engine.buffers import Step
from cram_jax.engine.executor import Program
from cram_jax.engine.fusion import Lookup
from cram_jax.engine.model import Model
from cram_jax.engine.operations import SpaceToDepth
from cram_jax.engine.plan import Builder, Tiles
from cram_jax.engine.reference import space_to_depth
from cram_jax.engine.targets import Target


class Session:
    """The program for one batch size and length, with its inputs and outputs."""

    def __init__(
        self,
        model: Model,
        target: Target,
        batch: int,
        length: int,
        threads: int,
        tiles: Tiles,
        *,
        keep: bool,
    ):
        self._graph, self._ranges = model.graph, model.ranges
        builder = Builder(model, target, batch, length, threads, tiles, keep)
        self.builder = builder
        self.program = Program(builder.steps, target, threads)
        # Where a call writes and reads, looked up once.
        self._indices = {
            node.inputs[0]
            for node in model.graph.nodes
            if isinstance(node.operation, Lookup)
        }
        self._integers = {
            node.name: self._positions(node.name)[:, 0, :, 0]
            for node in model.graph.inputs
            if model.graph.types[node.name].dtype == "int32"
        }
        self._results = [self._floats(name) for name in model.graph.outputs]

    def load(self, arrays: list[np.ndarray]) -> None:
        """Copies the inputs into their buffers."""
        by_name = {
            node.name: x for node, x in zip(self._graph.inputs, arrays, strict=True)
        }
        for name, places in self._integers.items():
            x = by_name[name]
            # A mask of 64 bits may hold numbers whose lower 32 bits are zero.
            places[...] = x if name in self._indices else x != 0
        for name, staging in self.builder.staging.items():
            node = self._graph[name]
            if isinstance(node.operation, SpaceToDepth):
                x = space_to_depth(by_name[node.inputs[0]], node.operation.size)
            else:
                x = by_name[name]
            staging[...] = x.reshape(staging.shape)

    def results(self) -> list[np.ndarray]:
        """Copies of the outputs, with their batch axes."""
        return [view.copy() for view in self._results]

    def read(self, name: str) -> np.ndarray:
        """A copy of a node's result, as floats, with its batch axis."""
        kind, buffers = self._graph.types[name], self.builder.buffers
        if kind.dtype == "int32":
            return self._positions(name)[:, 0, :, 0].astype(np.float32)
        if (name, "f32") in buffers:
            return self._floats(name).copy()
        if (name, "u8") in buffers:
            what, size = self._ranges[name], self.builder.layout.sizes[name]
            octets = buffers[name, "u8"].octets(kind.features, size)
            values = (octets.astype(np.float32) - what.zero) * np.float32(what.scale)
        else:
            values = self.builder.staging[name].copy()
        return self._shaped(name, values)

    def by_node(self) -> dict[str, list[Step]]:
        """The steps of every node, in order."""
        steps: dict[str, list[Step]] = {}
        for step in self.builder.steps:
            steps.setdefault(step.node, []).append(step)
        return steps

    # ------------------------------------------------------------------------- private
    def _positions(self, name: str) -> np.ndarray:
        size = self.builder.layout.sizes[name]
        return self.builder.buffers[name, "f32"].positions(size)

    def _floats(self, name: str) -> np.ndarray:
        features = self._graph.types[name].features
        size = self.builder.layout.sizes[name]
        buffer = self.builder.buffers[name, "f32"]
        return self._shaped(name, buffer.floats(features, size))

    def _shaped(self, name: str, values: np.ndarray) -> np.ndarray:
        """The axes of the graph: sequences have one position, features none."""
        match len(self._graph.types[name].shape):
            case 1:
                return values[:, 0, 0]
            case 2:
                return values[:, 0]
        return values
