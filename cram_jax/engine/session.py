"""A plan with its program, its inputs and its outputs."""

import numpy as np

from cram_jax.engine.buffers import Step
from cram_jax.engine.executor import Program
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
        self.builder = Builder(model, target, batch, length, threads, tiles, keep)
        self.program = Program(self.builder.steps, target, threads)

    def load(self, arrays: list[np.ndarray]) -> None:
        """Copies the inputs into their places."""
        builder = self.builder
        by_name = {
            node.name: x for node, x in zip(self._graph.inputs, arrays, strict=True)
        }
        for name, x in by_name.items():
            if self._graph.types[name].dtype == "int32":
                buffer = builder.buffers[name, "f32"]
                places = buffer.grid.places(builder.layout.sizes[name])
                buffer.lanes()[0, places[:, 0]] = x
        for name, staging in builder.staging.items():
            node = self._graph[name]
            if isinstance(node.operation, SpaceToDepth):
                x = space_to_depth(by_name[node.inputs[0]], node.operation.size)
            else:
                x = by_name[name]
            staging[...] = x.reshape(staging.shape)

    def read(self, name: str) -> np.ndarray:
        """A copy of a node's result, as floats, with its batch axis."""
        builder, kind = self.builder, self._graph.types[name]
        size = builder.layout.sizes[name]
        if kind.dtype == "int32":
            buffer = builder.buffers[name, "f32"]
            values = buffer.lanes()[0, buffer.grid.places(size)][:, 0]
            return values.astype(np.float32)
        if (name, "f32") in builder.buffers:
            values = builder.buffers[name, "f32"].floats(kind.features, size)
        elif (name, "u8") in builder.buffers:
            what = self._ranges[name]
            octets = builder.buffers[name, "u8"].octets(kind.features, size)
            values = (octets.astype(np.float32) - what.zero) * np.float32(what.scale)
        else:
            values = builder.staging[name]
        shape = [values.shape[0], *(s or builder.length for s in kind.shape)]
        return np.ascontiguousarray(values.reshape(shape))

    def by_node(self) -> dict[str, list[Step]]:
        """The steps of every node, in order."""
        steps: dict[str, list[Step]] = {}
        for step in self.builder.steps:
            steps.setdefault(step.node, []).append(step)
        return steps
