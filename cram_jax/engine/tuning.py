"""Tiles of products: a good guess, or a measurement on this processor."""

import contextlib
import json
import os
from pathlib import Path

from cram_jax.engine.kernels import SparseProduct
from cram_jax.engine.llvm import binding
from cram_jax.engine.model import PackedProduct
from cram_jax.engine.targets import Target
from cram_jax.writing import replacing

CANDIDATES = 4
# Vectors of a tile by registers and outputs of a block: what fits into the registers,
# and with it into the first cache.
_GUESSES = {16: {1: 4, 2: 4, 4: 3}, 32: {1: 8, 2: 8, 4: 5}}


def guess_tile(spec: SparseProduct, target: Target) -> int:
    """A tile that is good for most shapes."""
    return _GUESSES[target.registers][spec.rows]


def candidates(spec: SparseProduct, target: Target) -> list[int]:
    """Tiles worth measuring."""
    guess = guess_tile(spec, target)
    return sorted({max(1, guess // 2), max(1, 3 * guess // 4), guess, 3 * guess // 2})


class TileTable:
    """Measured tiles of this processor, in a file of the user's cache.

    A file that cannot be read is ignored; one that cannot be written is skipped, and so
    is one of a user without a home.
    """

    def __init__(self) -> None:
        folder = cache_folder()
        name = f"tiles-{binding().get_host_cpu_name()}.json"
        self._path = None if folder is None else folder / name
        self._tiles = self._read()

    def get(self, key: str) -> int | None:
        """The measured tile, or None."""
        return self._tiles.get(key)

    def update(self, tiles: dict[str, int]) -> None:
        """Adds tiles and writes the file, whole or not at all.

        Another engine may have measured tiles since the file was read; they stay.
        """
        self._tiles = self._read() | self._tiles | tiles
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as beside:
                beside.write_text(json.dumps(self._tiles, indent=0, sort_keys=True))

    def _read(self) -> dict[str, int]:
        if self._path is None:
            return {}
        with contextlib.suppress(OSError, ValueError):
            read = json.loads(self._path.read_text())
            if isinstance(read, dict):
                return {
                    key: tile
                    for key, tile in read.items()
                    if type(tile) is int and 1 <= tile <= 16
                }
        return {}


def tile_key(
    product: PackedProduct, spec: SparseProduct, target: Target, vectors: int
) -> str:
    """Everything that decides how long a product takes with a tile."""
    weights = product.weights
    shape = (weights.padded_outputs, weights.lanes, weights.taps, len(weights.values))
    kind = "int8" if spec.int8 else "f32"
    form = f"{spec.output}{spec.residual and '+' + spec.residual}{spec.activation}"
    return (
        f"{target.name} {kind} {spec.rows} {form} {'x'.join(map(str, shape))} {vectors}"
    )


def cache_folder() -> Path | None:
    """Where the user's caches are; None if the user has no home."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    try:
        return Path(root).expanduser() / "cram_jax"
    except RuntimeError:
        return None
