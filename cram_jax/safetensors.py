"""The safetensors format, strictly: a header in JSON, then arrays without gaps.

The same arrays give the same bytes. A file that is read is untrusted.
"""

import contextlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from cram_jax.writing import check_folder, replacing

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(bool),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000
_SIZES = (8, 4, 2, 1)  # wide types first, so that all arrays are aligned


class Entry(NamedTuple):
    """Where an array lies in the data behind the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file.

    Raises:
      TypeError: an array has a dtype that the format lacks.
    """
    ordered = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    sizes = {name: (arrays[name].dtype, arrays[name].shape) for name in ordered}
    data = (np.ascontiguousarray(arrays[name]).tobytes() for name in ordered)
    return b"".join([_header(sizes, metadata), *data])


def decode(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file.

    Raises:
      ValueError: the bytes are not such a file.
    """
    size = _header_size(content[:8], len(content))
    data = memoryview(content)[8 + size :]
    entries, metadata = _parse_header(content[8 : 8 + size], len(data))
    return {n: _array(data[e.start : e.stop], e) for n, e in entries.items()}, metadata


class File(Mapping[str, np.ndarray]):
    """The arrays of a file, each read when it is asked for.

    Attributes:
      metadata: texts by name.
      entries: dtype, shape and place of every array.

    Raises:
      ValueError: it is not such a file.
      OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with self.path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            size = _header_size(file.read(8), length)
            self._start = 8 + size
            header = file.read(size)
        self.entries, self.metadata = _parse_header(header, length - self._start)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(self._start + entry.start)
            data = file.read(entry.stop - entry.start)
        if len(data) != entry.stop - entry.start:
            raise ValueError(f"{self.path} ended while it was read")
        return _array(data, entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Writer:
    """Writes a file array by array, so that none has to stay in memory.

    A context manager: the file appears when the block ends without an error. The disk
    needs room for the data twice.

    Attributes:
      metadata: texts by name; what is there at the end of the block is written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.metadata = Path(path), dict[str, str]()
        check_folder(self.path)
        self._arrays: dict[int, dict[str, Any]] = {size: {} for size in _SIZES}
        self._spools: dict[int, IO[bytes]] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def add(self, name: str, array: np.ndarray) -> None:
        """Writes an array.

        Raises:
          ValueError: there is one of that name already.
          TypeError: it has a dtype that the format lacks.
        """
        array = np.asarray(array)
        _name_of(name, array.dtype)
        if any(name in arrays for arrays in self._arrays.values()):
            raise ValueError(f"two arrays are called {name!r}")
        size = array.itemsize
        if size not in self._spools:
            self._spools[size] = self._open.enter_context(
                tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
            )
        self._arrays[size][name] = array.dtype, array.shape
        self._spools[size].write(np.ascontiguousarray(array).tobytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._open:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        arrays = {n: a for size in _SIZES for n, a in self._arrays[size].items()}
        with replacing(self.path) as beside, beside.open("wb") as file:
            file.write(_header(arrays, self.metadata))
            for size in _SIZES:
                if size in self._spools:
                    self._spools[size].seek(0)
                    shutil.copyfileobj(self._spools[size], file, 2**20)


def parse_json(text: str | bytes) -> Any:
    """Parses JSON, refusing NaN, infinity and duplicate names.

    Raises:
      ValueError: it is not JSON, or too deep.
    """
    if not isinstance(text, str | bytes):
        raise ValueError(f"expected text, got {text!r:.100}")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("JSON holds a name twice")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=as_dict)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _header(
    arrays: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in arrays.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": _name_of(name, dtype),
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _name_of(name: str, dtype: np.dtype[Any]) -> str:
    if name == "__metadata__":
        raise ValueError(
            f"no array can be called {name!r}: the format keeps texts there"
        )
    if dtype not in _NAMES:
        expected = ", ".join(map(str, _NAMES))
        raise TypeError(f"array {name!r} must be of {expected}, got {dtype}")
    return _NAMES[dtype]


def _header_size(content: bytes, length: int) -> int:
    if len(content) < 8:
        raise ValueError("it is shorter than the length of a header")
    (size,) = struct.unpack("<Q", content)
    if size > min(length - 8, _LARGEST_HEADER):
        raise ValueError(f"its header of {size} bytes does not fit")
    return int(size)


def _parse_header(text: bytes, length: int) -> tuple[dict[str, Entry], dict[str, str]]:
    header = parse_json(text)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("its metadata are not texts by name")
    entries = {name: _entry(name, entry, length) for name, entry in header.items()}
    end = 0
    for start, stop in sorted((entry.start, entry.stop) for entry in entries.values()):
        if start != end:
            raise ValueError(f"arrays overlap or leave a gap at byte {end}")
        end = stop
    if end != length:
        raise ValueError(f"its arrays end at byte {end} of {length}")
    return entries, metadata


def _entry(name: str, entry: Any, length: int) -> Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"array {name!r} has no dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"array {name!r} has dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        is_list = isinstance(numbers, list) and len(numbers) <= 8
        if not is_list or any(type(n) is not int or n >> 48 for n in numbers):
            raise ValueError(f"array {name!r} has shape {shape!r} at {offsets!r}")
    size = dtype.itemsize * math.prod(shape)
    if len(offsets) != 2 or offsets[1] - offsets[0] != size or offsets[1] > length:
        raise ValueError(f"array {name!r} of shape {shape} does not fit at {offsets}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _array(data: bytes | memoryview, entry: Entry) -> np.ndarray:
    if entry.dtype == bool and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise ValueError("an array of bools holds other bytes than 0 and 1")
    # A copy, because the file's bytes may be unaligned and are freed.
    return np.frombuffer(data, entry.dtype).reshape(entry.shape).copy()
