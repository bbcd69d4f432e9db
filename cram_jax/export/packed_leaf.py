"""A leaf of parameters as the arrays of a packed file, and back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from cram_jax.axes import Axes
from cram_jax.export import masks
from cram_jax.nibbles import pack_nibbles, unpack_nibbles
from cram_jax.validation import check_choice

Values: TypeAlias = Literal["same", "float16", "bfloat16", "int8", "int4"]
"""How kept weights are stored."""

FLOATS = {
    name: np.dtype(dtype)
    for name, dtype in (
        ("float64", np.float64),
        ("float32", np.float32),
        ("float16", np.float16),
        ("bfloat16", jnp.bfloat16),
    )
}
LARGEST = {"int8": 127, "int4": 7}


@dataclass(frozen=True)
class Layout:
    """How a leaf is stored.

    Attributes:
      shape: of the leaf.
      dtype: of the leaf.
      values: what its entries are stored as: a dtype, "int8" or "int4".
      mask: its form; "" if all entries are stored.
      kept: how many entries are stored.
    """

    shape: tuple[int, ...]
    dtype: str
    values: str
    mask: str
    kept: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The arrays of the leaf in the file, by what follows its name."""
        masked = ("mask",) if self.mask else ()
        scaled = ("scale",) if self.values in LARGEST else ()
        return ("values", *masked, *scaled)


class Packed(NamedTuple):
    """What is stored of a leaf.

    Attributes:
      layout: how.
      arrays: its parts.
      exact: whether `unpack` returns the same numbers.
    """

    layout: Layout
    arrays: dict[str, np.ndarray]
    exact: bool


def pack(name: str, leaf: np.ndarray, axes: Axes, values: Values) -> Packed | None:
    """The parts of a leaf, or None if it stays unchanged.

    Raises:
      ValueError: its values cannot be stored so.
    """
    if str(leaf.dtype) not in FLOATS or not leaf.size:
        return None
    stored: str = str(leaf.dtype) if values == "same" else values
    scale: np.ndarray | None = None
    if stored in LARGEST:
        kinds, scale = _quantise(name, leaf, axes, LARGEST[stored])
        restored = (kinds * scale).astype(leaf.dtype)
    else:
        with np.errstate(over="ignore"):
            kinds = leaf.astype(FLOATS[stored])
        if (np.isfinite(leaf) & ~np.isfinite(kinds)).any():
            raise ValueError(f"leaf {name!r} is out of the range of {stored}")
        restored = kinds.astype(leaf.dtype)
    kept = leaf.reshape(-1) != 0
    form, mask = masks.encode(kept)
    sparse = _as_stored(kinds.reshape(-1)[kept], stored)
    dense = _as_stored(kinds.reshape(-1), stored)
    if sparse.nbytes + mask.nbytes < dense.nbytes:
        arrays, count = {"values": sparse, "mask": mask}, int(kept.sum())
    elif stored == str(leaf.dtype):
        return None
    else:
        arrays, form, count = {"values": dense}, "", leaf.size  # type: ignore[assignment]
    if scale is not None:
        arrays["scale"] = scale
    layout = Layout(leaf.shape, str(leaf.dtype), stored, form, count)
    return Packed(layout, arrays, np.array_equal(restored, leaf, equal_nan=True))


def _quantise(
    name: str, leaf: np.ndarray, axes: Axes, largest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Integers, as float32, and the scale that multiplies them.

    Weights that were rounded before reveal their scale only up to rounding error. So
    the neighbours of that scale are tried, and one that restores the weights bit for
    bit is taken if there is one.
    """
    wide = leaf.astype(np.float32)
    if not np.isfinite(wide).all():
        raise ValueError(f"leaf {name!r} must be finite to be stored as integers")
    own = axes.stack + (axes.lookup or axes.outputs)
    over = tuple(axis for axis in range(leaf.ndim) if axis not in own)
    middle = np.abs(wide).max(over, keepdims=True) / np.float32(largest)
    middle = np.where(middle > 0, middle, 1).astype(np.float32)
    up, down = (np.nextafter(middle, np.float32(end)) for end in (np.inf, 0))
    scale = middle
    for candidate in (down, up, middle):
        integers = np.clip(np.rint(wide / candidate), -largest, largest)
        restored = (integers * candidate).astype(leaf.dtype)
        is_exact = (restored == leaf).all(over, keepdims=True)
        scale = np.where(is_exact & (candidate > 0), candidate, scale)
    return np.clip(np.rint(wide / scale), -largest, largest), scale


def _as_stored(values: np.ndarray, stored: str) -> np.ndarray:
    """Flat values as they are written; two of four bits in a byte."""
    if stored == "int8":
        return values.astype(np.int8)
    if stored == "int4":
        return pack_nibbles(np.pad(values, (0, len(values) % 2)))
    return values


def check_layout(name: str, entry: Any) -> Layout:
    """The layout of a leaf, from the JSON of a file that may come from anybody.

    Raises:
      ValueError: it is none, with what is wrong in it.
    """
    fields = list(Layout.__dataclass_fields__)
    if not isinstance(entry, dict) or sorted(entry) != sorted(fields):
        raise ValueError(
            f"leaf {name!r} must have {sorted(fields)}, got {entry!r:.100}"
        )
    shape, kept = entry["shape"], entry["kept"]
    numbers = shape if isinstance(shape, list) and len(shape) <= 8 else [None]
    if any(type(n) is not int or n < 0 or n >> 48 for n in [*numbers, kept]):
        raise ValueError(f"leaf {name!r} has shape {shape!r:.100}, {kept!r:.100} kept")
    entries = math.prod(shape)
    if kept > entries or (not entry["mask"] and kept != entries):
        raise ValueError(f"leaf {name!r} keeps {kept} of {entries} entries")
    for field, choices in (
        ("dtype", tuple(FLOATS)),
        ("values", (*FLOATS, *LARGEST)),
        ("mask", ("", *masks.FORMS)),
    ):
        check_choice(f"{field} of leaf {name!r}", entry[field], choices)
    return Layout(**{**entry, "shape": tuple(shape)})


def unpack(
    name: str, layout: Layout, file: Mapping[str, np.ndarray], bits: int | None
) -> np.ndarray:
    """A leaf from its parts in a file; of integers only the leading bits.

    Raises:
      ValueError: a part does not fit the layout, with what is wrong in it.
    """
    values, dtype = file[f"{name}:values"], FLOATS[layout.dtype]
    stored = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)} | FLOATS
    size = -(-layout.kept // 2) if layout.values == "int4" else layout.kept
    if values.dtype != stored[layout.values] or values.shape != (size,):
        raise ValueError(
            f"its values are {values.dtype} of shape {values.shape}, expected "
            f"{stored[layout.values]} of shape {(size,)}"
        )
    if layout.values == "int4":
        values = unpack_nibbles(values)[: layout.kept]
    if layout.mask:
        content = file[f"{name}:mask"]
        if content.dtype != np.uint8 or content.ndim != 1:
            raise ValueError(f"its mask is {content.dtype} of rank {content.ndim}")
        entries = math.prod(layout.shape)
        mask = masks.decode(layout.mask, content, entries, layout.kept)  # type: ignore[arg-type]
        full = np.zeros(entries, values.dtype)
        full[mask] = values
        values = full
    array = values.reshape(layout.shape)
    if layout.values in LARGEST:
        scale = file[f"{name}:scale"]
        fits = scale.ndim == array.ndim and all(
            own in (1, size) for own, size in zip(scale.shape, array.shape, strict=True)
        )
        if scale.dtype != np.float32 or not fits:
            raise ValueError(f"its scale is {scale.dtype} of shape {scale.shape}")
        array, scale = _leading(array, scale, LARGEST[layout.values], bits)
        array = array.astype(np.float32) * scale
    return array.astype(dtype)


def _leading(
    integers: np.ndarray, scale: np.ndarray, largest: int, bits: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The leading bits of integers up to ``largest``, and their scale."""
    if bits is None or 2 ** (bits - 1) > largest:
        return integers, scale
    highest = 2 ** (bits - 1) - 1
    magnitudes = np.abs(integers) // ((largest + 1) // (highest + 1))
    return np.sign(integers) * magnitudes, scale * np.float32(largest / highest)
