"""Engines on disk: what is read is what was written, and damage is an error."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from engine.networks import convolutional, pointwise, transformer

from cram_jax import engine, safetensors
from cram_jax.engine.files import checksum, load
from cram_jax.engine.model import quantise_rows, restore_rows

NETWORKS = {f.__name__: f for f in (convolutional, transformer, pointwise)}


@pytest.fixture(scope="module")
def examples():
    """For every network its graph and inputs."""
    return {name: f(np.random.default_rng(1)) for name, f in NETWORKS.items()}


def compiled(examples, name, int8):
    graph, inputs = examples[name]
    return engine.compile(graph, calibration=[inputs] if int8 else None), inputs


def saved(written, path):
    """The bytes of an engine's file, and how many of them are its header."""
    written.save(path)
    content = path.read_bytes()
    return content, 8 + int.from_bytes(content[:8], "little")


def sealed(arrays, metadata):
    """The bytes of a file with the right checksum, as anybody can write them."""
    metadata = metadata | {"crc32": checksum(arrays, metadata)}
    return safetensors.encode(arrays, metadata)


def all_equal(got, expected):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_engine_gives_the_same_bits(examples, tmp_path, name, int8):
    written, inputs = compiled(examples, name, int8 and name != "pointwise")
    written.save(tmp_path / "engine.safetensors")
    read = load(tmp_path / "engine.safetensors")
    all_equal(read(*inputs), written(*inputs))


def test_an_engine_is_loaded_for_threads_and_instructions(examples, tmp_path):
    written, inputs = compiled(examples, "pointwise", False)
    written.save(tmp_path / "engine.safetensors")
    read = load(tmp_path / "engine.safetensors", threads=3, target="portable")
    assert (read.threads, read.target.name) == (3, "portable")
    all_equal(read(*inputs), read(*inputs))
    for got, expected in zip(read(*inputs), written(*inputs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="target must be"):
        load(tmp_path / "engine.safetensors", target="sse")


def test_a_save_that_fails_leaves_the_file_before(examples, tmp_path, monkeypatch):
    written, _ = compiled(examples, "pointwise", False)
    path = tmp_path / "engine.safetensors"
    written.save(path)
    before = path.read_bytes()
    write = Path.write_bytes

    def full(place, content):
        write(place, content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        written.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_four_bits_round_once_more(examples, tmp_path):
    written, inputs = compiled(examples, "convolutional", True)
    written.save(tmp_path / "8")
    written.save(tmp_path / "4", bits=4)
    read = load(tmp_path / "4")
    for node in read.model.graph.nodes:
        if hasattr(node.operation, "weights"):
            fine = written.model.graph[node.name].operation.weights
            coarse = node.operation.weights
            assert np.abs(coarse.values).max() <= 7
            np.testing.assert_array_equal(coarse.occupied, fine.occupied)
            numbers = fine.dense() * fine.scale
            error = np.abs(coarse.dense() * coarse.scale - numbers)
            assert (error <= 0.5001 * coarse.scale).all()
    assert np.isfinite(read(*inputs)[0]).all()
    read.save(tmp_path / "again", bits=4)
    all_equal(load(tmp_path / "again")(*inputs), read(*inputs))
    saved = (tmp_path / "8").stat().st_size - (tmp_path / "4").stat().st_size
    values = sum(
        node.operation.weights.values.size
        for node in written.model.graph.nodes
        if hasattr(node.operation, "weights")
    )
    assert saved == pytest.approx(values / 2, abs=64)
    with pytest.raises(ValueError, match="bits=4 needs an INT8 engine"):
        compiled(examples, "pointwise", False)[0].save(tmp_path / "x", bits=4)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 5"):
        written.save(tmp_path / "x", bits=5)


def test_tables_are_a_byte_for_a_number(examples, tmp_path):
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((50, 24)) * np.exp(rng.normal(size=(50, 1)))).astype(
        np.float32
    )
    table[3] = 0
    rows, scale = quantise_rows(table)
    restored = restore_rows(rows, scale)
    assert (np.abs(restored - table) <= 0.5001 * scale[:, None]).all()
    all_equal(quantise_rows(restored), (rows, scale))
    written, _ = compiled(examples, "transformer", True)
    written.save(tmp_path / "engine")
    arrays, _ = safetensors.decode((tmp_path / "engine").read_bytes())
    tables = [array for name, array in arrays.items() if name.endswith("/table")]
    assert [array.dtype for array in tables] == [np.int8] * 3


def test_tables_of_few_rows_are_exact(tmp_path):
    """All tokens of a text have the same type: an error of its row adds up."""
    rng = np.random.default_rng(0)
    types, words = rng.normal(size=(2, 8)), rng.normal(size=(40, 8))
    types[:, 3] = 100  # a byte's step is 0.8
    network = engine.GraphBuilder()
    ids, kinds = (
        network.add(engine.Input((None,), "int32"), name=name)
        for name in ("ids", "kinds")
    )
    x = network.add(engine.Embedding(words), ids)
    x = network.add(engine.Add(), x, network.add(engine.Embedding(types), kinds))
    x = network.add(engine.Linear(np.eye(8)), x)
    graph = network.build(x)
    inputs = rng.integers(0, 40, (5, 6)), rng.integers(0, 2, (5, 6))
    written = engine.compile(graph, calibration=[inputs])
    tables = [n.operation for n in written.model.graph.nodes if n.name != "linear"]
    kept = [part.table for part in tables if len(getattr(part, "table", ())) == 2]
    all_equal(kept, [types.astype(np.float32)])

    written.save(tmp_path / "engine")
    arrays, _ = safetensors.decode((tmp_path / "engine").read_bytes())
    stored = {a.shape: a.dtype for name, a in arrays.items() if name.endswith("/table")}
    assert stored == {(40, 8): np.int8, (2, 8): np.float32}
    all_equal(engine.load(tmp_path / "engine")(*inputs), written(*inputs))


def test_options_may_be_numbers_of_numpy(tmp_path):
    network = engine.GraphBuilder()
    x = network.add(engine.Input(tuple(np.array([3, 4]))))
    x = network.add(engine.Attention(np.int64(2)), x, x, x)
    x = network.add(engine.LayerNorm(np.ones(4), np.ones(4), np.float32(1e-6)), x)
    x = network.add(engine.Token(np.int32(1)), x)
    one, two = np.int64(1), np.int32(2)
    y = network.add(engine.Input((6, 6, 4)))
    y = network.add(engine.Conv(np.ones((3, 3, 4, 4)), None, two, one), y)
    y = network.add(engine.MaxPool(two, one, [[one, one], [one, one]]), y)
    written = engine.compile(network.build(x, y))
    written.save(tmp_path / "engine")
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 6, 6, 4))
    all_equal(load(tmp_path / "engine")(*inputs), written(*inputs))


def test_a_file_that_lacks_weights_is_damaged(tmp_path):
    network = engine.GraphBuilder()
    x = network.add(
        engine.Affine(np.ones(3), np.ones(3)), network.add(engine.Input((3,)))
    )
    engine.compile(network.build(x)).save(tmp_path / "engine")
    arrays, metadata = safetensors.decode((tmp_path / "engine").read_bytes())
    plan = json.loads(metadata["plan"])
    plan["nodes"][1]["options"]["scale"] = None
    metadata["plan"] = json.dumps(plan)
    (tmp_path / "engine").write_bytes(
        sealed({k: v for k, v in arrays.items() if "scale" not in k}, metadata)
    )
    with pytest.raises(ValueError, match="not a valid engine: scale must be an array"):
        load(tmp_path / "engine")


def test_the_safetensors_library_reads_the_file(examples, tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    written, _ = compiled(examples, "convolutional", True)
    written.save(tmp_path / "engine")
    ours, metadata = safetensors.decode((tmp_path / "engine").read_bytes())
    theirs = library.load_file(tmp_path / "engine")
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, ours[name])
    assert json.loads(metadata["plan"])["outputs"] == ["logits", "flat", "shares"]


@pytest.mark.parametrize("name", ["convolutional", "transformer"])
def test_a_flipped_bit_is_found(examples, tmp_path, name):
    written, inputs = compiled(examples, name, True)
    path = tmp_path / "engine"
    content, header = saved(written, path)
    rng = np.random.default_rng(0)

    def flip(at):
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        return damaged

    for at in rng.integers(header, len(content), 100):
        flip(at)
        with pytest.raises(ValueError, match="it is damaged: its checksum should be"):
            load(path)
    for at in rng.integers(0, header, 100):
        damaged = flip(at)
        try:
            read = load(path)
        except ValueError:
            continue
        assert b'"crc32"' not in damaged  # nothing was lost but this name
        all_equal(read(*inputs), written(*inputs))


@pytest.mark.parametrize("name", ["z/y", "/y", "y"])
def test_an_array_of_no_node_is_named(examples, tmp_path, name):
    written, _ = compiled(examples, "pointwise", False)
    written.save(tmp_path / "engine")
    arrays, metadata = safetensors.decode((tmp_path / "engine").read_bytes())
    arrays[name] = np.ones(3, np.float32)
    (tmp_path / "engine").write_bytes(sealed(arrays, metadata))
    with pytest.raises(ValueError, match=f"array '{name}' belongs to no node"):
        load(tmp_path / "engine")


def test_files_without_a_checksum_are_read(examples, tmp_path):
    written, inputs = compiled(examples, "pointwise", False)
    path = tmp_path / "engine"
    written.save(path)
    arrays, metadata = safetensors.decode(path.read_bytes())
    del metadata["crc32"]
    path.write_bytes(safetensors.encode(arrays, metadata))
    all_equal(load(path)(*inputs), written(*inputs))


@pytest.mark.parametrize(
    ("name", "int8"), [("convolutional", True), ("transformer", True)]
)
def test_damaged_files_are_errors_and_nothing_else(examples, tmp_path, name, int8):
    written, inputs = compiled(examples, name, int8)
    path = tmp_path / "engine"
    content, header = saved(written, path)
    rng = np.random.default_rng(0)
    causes = []
    for number in range(500):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            # Most bytes are data; the header is where damage is dangerous.
            limit = header if number % 3 else len(content)
            kind, at = rng.integers(3), rng.integers(min(limit, len(damaged)))
            if kind == 0:
                damaged[at] = rng.integers(256)
            elif kind == 1:
                damaged[at] = rng.choice(list(b'0123456789-.,"[]{}'))
            elif number % 10 == 0:
                del damaged[at:]
            else:
                damaged[at] ^= 1 << rng.integers(8)
            if not damaged:
                break
        # Who means harm writes a checksum that fits.
        with contextlib.suppress(ValueError, KeyError):
            damaged = sealed(*safetensors.decode(bytes(damaged)))
        path.write_bytes(damaged)
        try:
            read = load(path)
            if number % 5 == 0:
                read(*inputs)
        except ValueError as error:
            causes.append(str(error))
    assert len(causes) > 250
    assert not any("checksum" in cause for cause in causes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["nodes"].pop(0), "'image', which is not before it"),
        (lambda plan: plan["nodes"].reverse(), "which is not before it"),
        (lambda plan: plan.pop("outputs"), "'outputs' is missing"),
        (lambda plan: plan["outputs"].append("x"), "output 'x' is not a node"),
        (lambda plan: plan["ranges"].pop("stem"), "node 'stem' has no range"),
        (lambda plan: plan["ranges"].clear(), "must be float32 as ranges say"),
        (lambda plan: plan["ranges"].update(stem=[0.0, 0]), "scale must be positive"),
        (lambda plan: plan["ranges"].update(stem=[1.0, 256]), "between 0 and 255"),
        (lambda plan: plan["nodes"][0].update(kind="Conv"), "kind must be"),
        (
            lambda plan: plan["nodes"][0]["options"].update(shape=[13, 11, 2**30]),
            "must be between 1 and",
        ),
        (
            lambda plan: plan["nodes"][1]["options"].update(outputs=12),
            "must be .* of shape",
        ),
        (lambda plan: plan["nodes"][1]["options"].update(rows=3), "rows must be"),
        (
            lambda plan: plan["nodes"][1]["options"].update(pads=[[0, 0], [0, -1]]),
            "padding must be between",
        ),
        (lambda plan: plan.update(nodes={}), "nodes must be a list"),
    ],
)
def test_a_wrong_plan_is_named(examples, tmp_path, change, message):
    written, _ = compiled(examples, "convolutional", True)
    path = tmp_path / "engine"
    written.save(path)
    arrays, metadata = safetensors.decode(path.read_bytes())
    plan = json.loads(metadata["plan"])
    change(plan)
    path.write_bytes(sealed(arrays, metadata | {"plan": json.dumps(plan)}))
    with pytest.raises(ValueError, match=f"is not a valid engine: .*{message}"):
        load(path)
