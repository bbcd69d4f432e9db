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
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax import safetensors
from cram_jax.axes import AxesLike, axes_of
from cram_jax.export.packed_leaf import (
    FLOATS,
    Layout,
    Values,
    check_layout,
    pack,
    unpack,
)
from cram_jax.paths import named_leaves
from cram_jax.projector import Params
from cram_jax.validation import check_choice, check_integer

FORMAT, VERSION = "cram_jax.packed", "1"

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
            _check_name(name, name or "params, a single array,")
            if hasattr(leaf, "dtype") and jnp.issubdtype(
                leaf.dtype, jax.dtypes.prng_key
            ):
                raise TypeError(f"{name} is a PRNG key, which safetensors lacks")
            array = np.asarray(leaf)
            dense_bytes += array.nbytes
            packed = pack(name, array, own, values) if own.is_matrix else None
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
      TypeError: ``bits`` is not an integer.
      OSError: it cannot be read.

    Example:
      >>> import tempfile
      >>> from cram_jax.export import load_packed, save_packed
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = f"{folder}/params.safetensors"
      ...     saved = save_packed({"dense": {"kernel": jnp.eye(2)}}, path)
      ...     load_packed(path)
      {'dense/kernel': array([[1., 0.],
             [0., 1.]], dtype=float32)}
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
      ValueError: the file is damaged or not of this format, with what is wrong in it;
        or ``bits`` is out of range.
      TypeError: ``bits`` is not an integer.
      OSError: it cannot be read.

    Example:
      >>> import tempfile
      >>> from cram_jax.export import PackedFile, save_packed
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = f"{folder}/params.safetensors"
      ...     saved = save_packed({"bias": jnp.ones(2), "kernel": jnp.eye(64)}, path)
      ...     file = PackedFile(path)
      ...     file.shapes, file["bias"]
      ({'bias': (2,), 'kernel': (64, 64)}, array([1., 1.], dtype=float32))
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
            name: (layout.shape, FLOATS[layout.dtype])
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
            return unpack(name, self._layout[name], self._file, self._bits)
        except ValueError as error:
            raise ValueError(f"{self.path}: leaf {name!r}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _read_layout(file: safetensors.File) -> dict[str, Layout]:
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
        layouts[name] = layout = check_layout(name, entry)
        expanded += math.prod(layout.shape) * FLOATS[layout.dtype].itemsize
        if name in file.entries:
            raise ValueError(f"leaf {name!r} is there twice")
        for part in layout.parts:
            if f"{name}:{part}" not in file.entries:
                raise ValueError(f"leaf {name!r} lacks its {part}")
            unused.remove(f"{name}:{part}")
    if unused:
        raise ValueError(f"tensor {min(unused)!r} belongs to no leaf")
    size = file.path.stat().st_size
    if expanded > 2**20 + _EXPANSION * size:
        raise ValueError(f"{expanded} bytes of weights cannot be of a file of {size}")
    for name in file.entries:
        if ":" not in name:
            _check_name(name, "a leaf")
    return layouts


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
