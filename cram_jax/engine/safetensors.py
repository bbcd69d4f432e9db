"""The safetensors format, strictly: a header in JSON, then arrays without gaps."""

import json
import struct
from typing import Any

import numpy as np

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000


def encode(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The bytes of a file."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    # As the library orders them: wide types first, so that all are aligned.
    ordered = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    for name in ordered:
        start, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _NAMES[arrays[name].dtype],
            "shape": arrays[name].shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = (np.ascontiguousarray(arrays[name]).tobytes() for name in ordered)
    return b"".join([struct.pack("<Q", len(text)), text, *data])


def decode(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file.

    Raises:
      ValueError: the bytes are not such a file.
    """
    if len(content) < 8:
        raise ValueError("it is shorter than the length of a header")
    (size,) = struct.unpack_from("<Q", content)
    if size > min(len(content) - 8, _LARGEST_HEADER):
        raise ValueError(f"its header of {size} bytes does not fit")
    header = parse_json(content[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are not a JSON object")
    data = memoryview(content)[8 + size :]
    arrays, spans = {}, []
    for name, entry in header.items():
        arrays[name], span = _decode_array(name, entry, data)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"arrays overlap or leave a gap at byte {end}")
        end = stop
    if end != len(data):
        raise ValueError(f"its arrays end at byte {end} of {len(data)}")
    return arrays, metadata


def parse_json(text: str | bytes) -> Any:
    """Parses JSON without NaN and infinity.

    Raises:
      ValueError: it is not JSON, or too deep.
    """
    if not isinstance(text, str | bytes):
        raise ValueError(f"expected text, got {text!r:.100}")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _decode_array(
    name: str, entry: Any, data: memoryview
) -> tuple[np.ndarray, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"array {name!r} has no dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"array {name!r} has dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        is_list = isinstance(numbers, list) and len(numbers) <= 8
        if not is_list or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"array {name!r} has shape {shape!r} at {offsets!r}")
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if len(offsets) != 2 or offsets[1] - offsets[0] != size or offsets[1] > len(data):
        raise ValueError(f"array {name!r} of shape {shape} does not fit at {offsets}")
    # A copy: the file's bytes may be anywhere, and are let go.
    array = np.frombuffer(data[offsets[0] : offsets[1]], dtype).reshape(shape).copy()
    return array, (offsets[0], offsets[1])
