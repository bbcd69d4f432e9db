"""Compressed parameters in a safetensors file: masks and the values that were kept.

A leaf ``a/kernel`` that became smaller is stored as ``a/kernel:values``, its kept
entries in order, ``a/kernel:mask``, see `cram_jax.export.masks`, and, if the values are
integers, ``a/kernel:scale``. Any other leaf is an ordinary tensor of its own name, so
that other tools read it. The metadata say how to put the leaves together again.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax import safetensors
from cram_jax.axes import Axes, AxesLike, axes_of
from cram_jax.export import masks
from cram_jax.paths import named_leaves
from cram_jax.projector import Params
from cram_jax.validation import check_choice, check_integer

FORMAT, VERSION = "cram_jax.packed", "1"

Values: TypeAlias = Literal["same", "float16", "bfloat16", "int8", "int4"]
"""How kept weights are stored."""

_FLOATS = {
    name: np.dtype(dtype)
    for name, dtype in (
        ("float64", np.float64),
        ("float32", np.float32),
        ("float16", np.float16),
        ("bfloat16", jnp.bfloat16),
    )
}
_LARGEST = {"int8": 127, "int4": 7}
# An unpacked model is at most this many times the file's size, plus a megabyte.
_EXPANSION = 4096


class Saved(NamedTuple):
    """What `save_packed` wrote.

    Attributes:
      file_bytes: size of the file.
      dense_bytes: of the parameters as arrays.
      exact: whether `load_packed` returns the same numbers.
    """

    file_bytes: int
    dense_bytes: int
    exact: bool


def save_packed(
    params: Params,
    path: str | os.PathLike[str],
    *,
    values: Values = "same",
    axes: AxesLike | None = None,
) -> Saved:
    """Writes compressed parameters to a small safetensors file.

    Leaves that are matrices are stored as the values that are not zero, and a mask, if
    that is smaller than all of the values. Integers have a scale for each output (each
    row of a lookup table), as `fake_quant` has: what ``fake_quant(8)`` or
    ``fake_quant(4)`` rounded comes back bit for bit, anything else is rounded here.
    Negative zeros come back as zeros.

    Leaves are converted one at a time, so they never have to fit in memory together.

    Args:
      params: a pytree of arrays, or of anything with a shape that NumPy converts, such
        as `numpy.memmap`.
      path: of the file; it appears when everything has been written, and the same
        parameters give the same bytes.
      values: what matrices of floats are stored as: "same", their own dtype, with
        which everything comes back exactly; "float16", "bfloat16", "int8" or "int4".
      axes: what is known of the axes, see `axes_of`.

    Returns:
      The sizes, and whether anything was rounded.

    Raises:
      ValueError: ``values`` is unknown, a weight is out of its range, a path cannot be
        a name, or two leaves have one name.
      TypeError: a leaf has a dtype that safetensors lacks.

    Example:
      >>> import tempfile, pathlib
      >>> from cram_jax.export import load_packed, save_packed
      >>> kernel = jax.random.normal(jax.random.key(0), (64, 64))
      >>> pruned = compress({"kernel": kernel}, top_k(0.9)).params
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "pruned.safetensors"
      ...     saved = save_packed(pruned, path)
      ...     same = load_packed(path, like=pruned)
      >>> bool((same["kernel"] == pruned["kernel"]).all())
      True
    """
    check_choice("values", values, get_args(Values))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), np.float32), params
    )
    layout: dict[str, dict[str, Any]] = {}
    dense_bytes, exact = 0, True
    with safetensors.Writer(path) as file:
        for (name, leaf), own in zip(
            named_leaves(params), axes_of(shapes, axes), strict=True
        ):
            _check_name(name, name)
            array = np.asarray(leaf)
            dense_bytes += array.nbytes
            packed = _pack(name, array, own, values) if own.is_matrix else None
            if packed is None:
                file.add(name, array)
                continue
            exact &= packed.exact
            layout[name] = asdict(packed.layout)
            for part, stored in packed.arrays.items():
                file.add(f"{name}:{part}", stored)
        file.metadata = {
            "format": FORMAT,
            "version": VERSION,
            "layout": json.dumps(layout),
        }
    return Saved(Path(path).stat().st_size, dense_bytes, exact)


def load_packed(
    path: str | os.PathLike[str],
    *,
    like: Params | None = None,
    bits: int | None = None,
) -> Params:
    """Reads the parameters that `save_packed` wrote.

    Args:
      path: of the file; it may come from anybody.
      like: a pytree of arrays or shapes; None: a dictionary by path, such as
        ``{"dense/kernel": ...}``.
      bits: how many leading bits of integers to read, as `nested` trains for; None:
        all.

    Returns:
      NumPy arrays, in the structure of ``like``.

    Raises:
      ValueError: the file is damaged or not of this format, it holds other leaves than
        ``like``, or ``bits`` is out of range.
      OSError: it cannot be read.
    """
    file = PackedFile(path, bits=bits)
    if like is None:
        return dict(file)
    wanted = named_leaves(like)
    shapes = {name: tuple(np.shape(leaf)) for name, leaf in wanted}
    if shapes != file.shapes:
        name = min(
            n for n in {*shapes, *file.shapes} if shapes.get(n) != file.shapes.get(n)
        )
        raise ValueError(
            f"{os.fspath(path)} does not fit `like`: {name!r} is "
            f"{file.shapes.get(name, 'missing')} in the file and "
            f"{shapes.get(name, 'missing')} there"
        )
    structure: Any = jax.tree.structure(like)
    return structure.unflatten([file[name] for name, _ in wanted])


class PackedFile(Mapping[str, np.ndarray]):
    """The leaves of a packed file by path, each unpacked when it is asked for.

    Args:
      path: of the file.
      bits: see `load_packed`.

    Attributes:
      shapes: the shape of every leaf.
      dtypes: the dtype of every leaf.

    Raises:
      ValueError: the file is damaged or not of this format, with what is wrong in it.
      OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], *, bits: int | None = None):
        if bits is not None:
            check_integer("bits", bits, 2, 8)
        self.path, self._bits = Path(path), bits
        try:
            self._file = safetensors.File(path)
            self._layout = _read_layout(self._file)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{os.fspath(path)} is not packed: {error}") from error
        plain = {
            name: (entry.shape, entry.dtype)
            for name, entry in self._file.entries.items()
            if ":" not in name
        }
        packed = {
            name: (layout.shape, _FLOATS[layout.dtype])
            for name, layout in self._layout.items()
        }
        both = dict(sorted((plain | packed).items()))
        self.shapes = {name: shape for name, (shape, _) in both.items()}
        self.dtypes = {name: dtype for name, (_, dtype) in both.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._layout:
            if ":" in name:
                raise KeyError(name)
            return self._file[name]
        try:
            return _unpack(name, self._layout[name], self._file, self._bits)
        except ValueError as error:
            raise ValueError(f"{self.path}: leaf {name!r}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class _Layout:
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


class _Packed(NamedTuple):
    layout: _Layout
    arrays: dict[str, np.ndarray]
    exact: bool


def _pack(name: str, leaf: np.ndarray, axes: Axes, values: Values) -> _Packed | None:
    """The parts of a leaf, or None if it stays unchanged."""
    if str(leaf.dtype) not in _FLOATS or not leaf.size:
        return None
    stored: str = str(leaf.dtype) if values == "same" else values
    scale: np.ndarray | None = None
    if stored in _LARGEST:
        kinds, scale = _quantise(name, leaf, axes, _LARGEST[stored])
        restored = (kinds * scale).astype(leaf.dtype)
    else:
        with np.errstate(over="ignore"):
            kinds = leaf.astype(_FLOATS[stored])
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
    layout = _Layout(leaf.shape, str(leaf.dtype), stored, form, count)
    return _Packed(layout, arrays, np.array_equal(restored, leaf, equal_nan=True))


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
        nibbles = np.pad(values, (0, len(values) % 2)).astype(np.int8) + 8
        pairs = nibbles.astype(np.uint8).reshape(-1, 2)
        return pairs[:, 0] | pairs[:, 1] << 4
    return values


def _read_layout(file: safetensors.File) -> dict[str, _Layout]:
    """The checked layout of every packed leaf."""
    metadata = file.metadata
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise ValueError(f"its metadata do not say {FORMAT} version {VERSION}")
    stored = safetensors.parse_json(metadata.get("layout"))  # type: ignore[arg-type]
    if not isinstance(stored, dict):
        raise ValueError("its layout is not an object")
    unused = {name for name in file.entries if ":" in name}
    layouts = {}
    expanded = 0
    for name, entry in stored.items():
        _check_name(name, "a leaf")
        layouts[name] = layout = _check_layout(name, entry)
        expanded += math.prod(layout.shape) * _FLOATS[layout.dtype].itemsize
        if name in file.entries:
            raise ValueError(f"leaf {name!r} is there twice")
        parts = {"values", *(["mask"] if layout.mask else [])}
        parts |= {"scale"} if layout.values in _LARGEST else set()
        for part in parts:
            if f"{name}:{part}" not in file.entries:
                raise ValueError(f"leaf {name!r} lacks its {part}")
        unused -= {f"{name}:{part}" for part in parts}
    if unused:
        raise ValueError(f"tensor {min(unused)!r} belongs to no leaf")
    size = file.path.stat().st_size
    if expanded > 2**20 + _EXPANSION * size:
        raise ValueError(f"{expanded} bytes of weights cannot be of a file of {size}")
    for name in file.entries:
        if ":" not in name:
            _check_name(name, "a leaf")
    return layouts


def _check_layout(name: str, entry: Any) -> _Layout:
    fields = list(_Layout.__dataclass_fields__)
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
        ("dtype", tuple(_FLOATS)),
        ("values", (*_FLOATS, *_LARGEST)),
        ("mask", ("", *masks.FORMS)),
    ):
        check_choice(f"{field} of leaf {name!r}", entry[field], choices)
    return _Layout(**{**entry, "shape": tuple(shape)})


def _unpack(
    name: str, layout: _Layout, file: safetensors.File, bits: int | None
) -> np.ndarray:
    values, dtype = file[f"{name}:values"], _FLOATS[layout.dtype]
    stored = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)} | _FLOATS
    size = -(-layout.kept // 2) if layout.values == "int4" else layout.kept
    if values.dtype != stored[layout.values] or values.shape != (size,):
        raise ValueError(
            f"its values are {values.dtype} of shape {values.shape}, expected "
            f"{stored[layout.values]} of shape {(size,)}"
        )
    if layout.values == "int4":
        nibbles = np.stack([values & 15, values >> 4], axis=1).reshape(-1)
        values = nibbles[: layout.kept].astype(np.int8) - 8
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
    if layout.values in _LARGEST:
        scale = file[f"{name}:scale"]
        fits = scale.ndim == array.ndim and all(
            own in (1, size) for own, size in zip(scale.shape, array.shape, strict=True)
        )
        if scale.dtype != np.float32 or not fits:
            raise ValueError(f"its scale is {scale.dtype} of shape {scale.shape}")
        array, scale = _leading(array, scale, _LARGEST[layout.values], bits)
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


def _check_name(name: str, what: str) -> None:
    """Raises unless a name is a path below a root, with nothing that leaves it."""
    parts = name.split("/")
    if (
        not name.isprintable()
        or {"", ".", ".."} & set(parts)
        or set(name) & {":", "\\"}
    ):
        raise ValueError(
            f"{what} must be named by a path such as 'dense/kernel', without ':', "
            f"'\\\\' and '..', got {name!r:.100}"
        )
