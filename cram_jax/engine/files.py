"""Engines on disk: a safetensors file of bitmaps, values, scales and a plan as JSON.

Files are untrusted. The reader knows only this one format; names, shapes and numbers
are checked by the same constructors that users call, before anything is planned.
"""

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cram_jax import safetensors
from cram_jax.engine import operations
from cram_jax.engine.arrays import as_pads, as_pair
from cram_jax.engine.engine import Engine
from cram_jax.engine.fusion import Lookup
from cram_jax.engine.graph import Graph, Node
from cram_jax.engine.kernels import UNIT
from cram_jax.engine.model import (
    IntegerAttention,
    Model,
    PackedProduct,
    Range,
    is_large,
    make_model,
    quantise_rows,
    restore_rows,
)
from cram_jax.engine.operations import Operation
from cram_jax.engine.packing import SparseWeights, lanes_of, round_up
from cram_jax.engine.targets import Target, choose_target
from cram_jax.nibbles import pack_nibbles, unpack_nibbles
from cram_jax.validation import check_choice, check_integer
from cram_jax.writing import replacing

FORMAT, VERSION = "cram_jax.engine", "1"

_KINDS = {
    kind.__name__: kind
    for kind in (
        *(operations.Input, operations.Affine, operations.Relu, operations.Gelu),
        *(operations.Tanh, operations.Softmax, operations.Add, operations.LayerNorm),
        *(operations.AddPositions, operations.Attention, operations.MaxPool),
        *(operations.AvgPool, operations.Mean, operations.Flatten),
        *(operations.SpaceToDepth, operations.Token, Lookup, PackedProduct),
        IntegerAttention,
    )
}
_LARGEST_CHANNELS = 2**24


def load(
    path: str | os.PathLike[str],
    *,
    threads: int = 1,
    target: str | Target | None = None,
) -> Engine:
    """Reads an engine that `Engine.save` wrote.

    Args:
      path: of the file; it may come from anybody.
      threads: how many work on a call.
      target: the instruction set, as for `compile`; it need not be the one of the
        writer.

    Returns:
      The engine.

    Raises:
      ValueError: the file is damaged or not of this format, with what is wrong in it;
        the instruction set is missing, or ``threads`` is out of range.
      TypeError: ``threads`` is not an integer.
      OSError: the file cannot be read.
      ImportError: llvmlite is not installed.

    Example:
      >>> import tempfile
      >>> from cram_jax import engine
      >>> network = engine.GraphBuilder()
      >>> outputs = network.add(engine.Softmax(), network.add(engine.Input((2,))))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     engine.compile(network.build(outputs)).save(f"{folder}/a.safetensors")
      ...     run = engine.load(f"{folder}/a.safetensors")
      >>> run([[3.0, 3.0]])
      array([[0.5, 0.5]], dtype=float32)
    """
    content = Path(path).read_bytes()
    try:
        arrays, metadata = safetensors.decode(content)
        model = _decode_model(arrays, metadata)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        reason = (
            f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        )
        raise ValueError(
            f"{os.fspath(path)} is not a valid engine: {reason}"
        ) from error
    return Engine(model, choose_target(target), threads)


def save_model(model: Model, path: Path, bits: int) -> None:
    """Writes a model; see `Engine.save`."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")
    if bits == 4 and not model.int8:
        raise ValueError("bits=4 needs an INT8 engine, got a float32 one")
    arrays: dict[str, np.ndarray] = {}
    nodes = []
    for node in model.graph.nodes:
        if isinstance(node.operation, PackedProduct):
            options, own = _encode_product(node.operation, bits)
        else:
            options, own = _encode_operation(node.operation)
            if model.int8 and "table" in own and is_large(own["table"]):
                own["table"], own["table_scale"] = quantise_rows(own["table"])
        kind = type(node.operation).__name__
        nodes.append(
            {"name": node.name, "kind": kind, "inputs": node.inputs, "options": options}
        )
        arrays |= {f"{node.name}/{name}": array for name, array in own.items()}
    plan = {
        "nodes": nodes,
        "outputs": model.graph.outputs,
        "ranges": {name: [r.scale, int(r.zero)] for name, r in model.ranges.items()},
    }
    metadata = {"format": FORMAT, "version": VERSION, "plan": json.dumps(plan)}
    metadata["crc32"] = checksum(arrays, metadata)
    with replacing(path) as beside:
        beside.write_bytes(safetensors.encode(arrays, metadata))


def checksum(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """CRC-32 of the plan and the arrays: it finds damage, not bad intentions."""
    kinds = [(name, str(arrays[name].dtype), arrays[name].shape) for name in arrays]
    total = zlib.crc32(json.dumps([metadata["plan"], sorted(kinds)]).encode())
    for name in sorted(arrays):
        octets = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
        total = zlib.crc32(octets.data, total)
    return f"{total:08x}"


def _encode_operation(
    operation: Operation,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    named = {
        field.name: getattr(operation, field.name)
        for field in dataclasses.fields(operation)  # type: ignore[arg-type]
    }
    arrays = {n: v for n, v in named.items() if isinstance(v, np.ndarray)}
    return {n: v for n, v in named.items() if n not in arrays}, arrays


def _encode_product(
    product: PackedProduct, bits: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    weights = product.weights
    options = {
        "window": weights.window,
        "inputs": weights.inputs,
        "outputs": weights.outputs,
        "rows": weights.rows,
        "strides": product.strides,
        "pads": product.pads,
        "activation": product.activation,
        "values": "int4" if bits == 4 else "int8" if weights.int8 else "float32",
    }
    arrays = {
        "blocks": np.packbits(weights.occupied),
        "values": weights.values,
        "bias": product.bias,
    }
    if weights.scale is not None:
        arrays["scale"] = weights.scale
    if bits == 4:
        assert weights.scale is not None
        values, step = weights.values, np.float32(1)
        if np.abs(values.astype(np.int16)).max(initial=0) > 7:  # else it has 4 bits
            step = np.float32(127 / 7)
            values = np.rint(values.astype(np.float32) * 7 / 127).astype(np.int8)
        arrays["values"] = pack_nibbles(values.reshape(-1))
        arrays["scale"] = weights.scale * step
    return options, arrays


def _decode_model(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Model:
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise ValueError(f"its metadata do not say {FORMAT} version {VERSION}")
    expected = metadata.get("crc32")  # older files have none
    if expected is not None and expected != (found := checksum(arrays, metadata)):
        raise ValueError(
            f"it is damaged: its checksum should be {expected:.20}, got {found}"
        )
    plan = safetensors.parse_json(metadata["plan"])
    _expect_type("plan", plan, dict)
    by_node: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        owner, slash, field = key.rpartition("/")
        by_node.setdefault(owner + slash, {})[field] = array
    nodes = []
    for entry in _expect_type("nodes", plan["nodes"], list):
        _expect_type("a node", entry, dict)
        name = _expect_type("name", entry["name"], str)
        inputs = _expect_type("inputs", entry["inputs"], list)
        for source in inputs:
            _expect_type("an input", source, str)
        own = by_node.get(f"{name}/", {})
        options = _expect_type("options", entry["options"], dict)
        operation = _decode_operation(entry["kind"], options, own)
        nodes.append(Node(name, operation, tuple(inputs)))
    unused = set(by_node) - {f"{node.name}/" for node in nodes}
    if unused:
        name = min(owner + field for owner in unused for field in by_node[owner])
        raise ValueError(f"array {name!r} belongs to no node")
    outputs = _expect_type("outputs", plan["outputs"], list)
    for output in outputs:
        _expect_type("an output", output, str)
    graph = Graph(tuple(nodes), tuple(outputs))
    ranges = {}
    for name, pair in _expect_type("ranges", plan["ranges"], dict).items():
        scale, zero = _expect_type(f"range of {name!r}", pair, list)
        ranges[name] = Range(float(scale), zero)
    return make_model(graph, ranges)


def _decode_operation(
    kind: Any, options: dict[str, Any], arrays: dict[str, np.ndarray]
) -> Operation:
    check_choice("kind", kind, sorted(_KINDS))
    if kind == "PackedProduct":
        return _decode_product(options, arrays)
    if "table_scale" in arrays:
        arrays = {**arrays, "table": _decode_table(arrays)}
        del arrays["table_scale"]
    cls = _KINDS[kind]
    names = {field.name for field in dataclasses.fields(cls)}
    given = {**options, **arrays}
    if set(given) != names:
        raise ValueError(f"{kind} must have {sorted(names)}, got {sorted(given)}")
    if "epsilon" in given and type(given["epsilon"]) is not float:
        raise ValueError(f"epsilon must be a number, got {given['epsilon']!r}")
    return cls(**given)


def _decode_table(arrays: dict[str, np.ndarray]) -> np.ndarray:
    scale = arrays["table_scale"]
    if scale.ndim != 1 or arrays["table"].ndim != 2:
        raise ValueError("a table of integers must have a scale for every row")
    scale = _array(arrays, "table_scale", np.float32, (len(arrays["table"]),))
    rows = _array(arrays, "table", np.int8, arrays["table"].shape)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError("table_scale must be positive and finite")
    return restore_rows(rows, scale)


def _decode_product(
    options: dict[str, Any], arrays: dict[str, np.ndarray]
) -> PackedProduct:
    values_kind = options["values"]
    check_choice("values", values_kind, ("float32", "int8", "int4"))
    check_choice("activation", options["activation"], ("", "relu", "gelu", "tanh"))
    is_int = values_kind != "float32"
    window = as_pair("window", _expect_type("window", options["window"], list))
    strides = as_pair("strides", _expect_type("strides", options["strides"], list))
    pads = as_pads(_expect_type("pads", options["pads"], list))
    assert not isinstance(pads, str)
    inputs, outputs = options["inputs"], options["outputs"]
    check_integer("inputs", inputs, minimum=1, maximum=_LARGEST_CHANNELS)
    check_integer("outputs", outputs, minimum=1, maximum=_LARGEST_CHANNELS)
    rows = options["rows"]
    if rows not in (1, 2, 4) or type(rows) is not int:
        raise ValueError(f"rows must be 1, 2 or 4, got {rows!r}")
    groups = round_up(outputs, UNIT) // rows
    places = lanes_of(inputs, is_int) * window[0] * window[1]
    blocks = _array(arrays, "blocks", np.uint8, (-(-groups * places // 8),))
    occupied = np.unpackbits(blocks, count=groups * places).astype(bool)
    count = int(occupied.sum())
    if values_kind == "float32":
        values = _array(arrays, "values", np.float32, (count, rows))
    elif values_kind == "int8":
        values = _array(arrays, "values", np.int8, (count, rows, 4))
    else:
        pairs = _array(arrays, "values", np.uint8, (count * rows * 2,))
        values = unpack_nibbles(pairs).reshape(count, rows, 4)
    scale = _array(arrays, "scale", np.float32, (outputs,)) if is_int else None
    bias = _array(arrays, "bias", np.float32, (outputs,))
    for name, array in (("values", values), ("scale", scale), ("bias", bias)):
        if array is not None and not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite")
    if scale is not None and not (scale > 0).all():
        raise ValueError("scale must be positive")
    weights = SparseWeights(
        window,
        inputs,
        outputs,
        rows,
        occupied.reshape(groups, places),
        values,
        scale,
    )
    activation = options["activation"]
    return PackedProduct(weights, bias, strides, pads, activation)


def _array(
    arrays: dict[str, np.ndarray], name: str, dtype: Any, shape: tuple[int, ...]
) -> np.ndarray:
    array = arrays[name]
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{name} must be {np.dtype(dtype)} of shape {shape}, got {array.dtype} of "
            f"shape {array.shape}"
        )
    return array


def _expect_type(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, got {value!r:.100}")
    return value
