"""Checks of what an engine is called with."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cram_jax.engine.fusion import Lookup
from cram_jax.engine.model import Model

_SHAPES = 8  # how many calls' shapes are remembered as checked


class Call(NamedTuple):
    """What a call brings.

    Attributes:
      arrays: one for each input of the graph.
      batch: its size, maybe 0.
      length: of the sequences; 1 if there are none.
    """

    arrays: list[np.ndarray]
    batch: int
    length: int


class Arguments:
    """Checks the arguments of one model; each shape only once.

    Args:
      model: whose inputs they are.
    """

    def __init__(self, model: Model):
        self._graph = model.graph
        self._entries = _table_sizes(model)
        self._checked: dict[tuple[Any, ...], tuple[int, int]] = {}

    def of_shapes(self, given: Sequence[tuple[Any, Any]]) -> tuple[int, int]:
        """Batch size and length of inputs with these shapes and dtypes."""
        nodes = self._graph.inputs
        if len(given) != len(nodes):
            raise ValueError(
                f"inputs must be {len(nodes)} arrays "
                f"({', '.join(node.name for node in nodes)}), got {len(given)}"
            )
        batch, length = None, None
        for node, (shape, dtype) in zip(nodes, given, strict=True):
            kind = self._graph.types[node.name]
            expected = ("batch", *("length" if s is None else s for s in kind.shape))
            fits = len(shape) == len(expected) and all(
                wanted is None or wanted == size
                for wanted, size in zip(kind.shape, shape[1:], strict=True)
            )
            if not fits:
                raise ValueError(
                    f"input {node.name!r} must have shape "
                    f"({', '.join(map(str, expected))}), got {tuple(shape)}"
                )
            if kind.dtype == "int32":
                is_right = np.dtype(dtype).kind in "iub"
            else:
                is_right = np.dtype(dtype).kind == "f" or str(dtype) == "bfloat16"
            if not is_right:
                raise TypeError(
                    f"input {node.name!r} must be {kind.dtype}, got {np.dtype(dtype)}"
                )
            if batch not in (None, shape[0]):
                raise ValueError(
                    f"inputs must share one batch size, got {batch} and {shape[0]}"
                )
            batch = int(shape[0])
            if kind.has_length:
                if length not in (None, shape[1]):
                    raise ValueError(
                        f"inputs must share one length, got {length} and {shape[1]}"
                    )
                length = int(shape[1])
                if not 1 <= length <= 2**16:
                    raise ValueError(f"length must be from 1 to 65536, got {length}")
        return batch or 0, length or 1

    def some(self, inputs: tuple[Any, ...]) -> Call:
        """As `check`, and an error if the batch is empty."""
        arrays, batch, length = self.check(inputs)
        if batch == 0:
            raise ValueError("inputs must hold at least one example, got none")
        return Call(arrays, batch, length)

    def check(self, inputs: tuple[Any, ...]) -> Call:
        """The arrays of a call, its batch size and length; ids lie in their tables."""
        arrays = [np.asarray(x) for x in inputs]
        given = tuple((x.shape, x.dtype) for x in arrays)
        if given not in self._checked:
            checked = self.of_shapes(given)
            if len(self._checked) >= _SHAPES:
                self._checked.clear()
            self._checked[given] = checked
        batch, length = self._checked[given]
        if not self._entries:
            return Call(arrays, batch, length)
        for node, x in zip(self._graph.inputs, arrays, strict=True):
            entries = self._entries.get(node.name)
            if entries is not None and x.size:
                low, high = int(x.min()), int(x.max())
                if low < 0 or high >= entries:
                    raise ValueError(
                        f"input {node.name!r} must have ids from 0 to {entries - 1}, "
                        f"got {low if low < 0 else high}"
                    )
        return Call(arrays, batch, length)


def _table_sizes(model: Model) -> dict[str, int]:
    """For every input of ids, the entries of the smallest table that they index."""
    entries: dict[str, int] = {}
    for node in model.graph.nodes:
        if isinstance(node.operation, Lookup):
            name, size = node.inputs[0], len(node.operation.table)
            entries[name] = min(entries.get(name, size), size)
    return entries
