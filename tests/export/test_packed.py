"""Packed files: what is read is what was written, and damage is an error."""

import contextlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from cram_jax import compose, compress, fake_quant, matching, nested, safetensors, top_k
from cram_jax.export import PackedFile, load_packed, save_packed

pytestmark = pytest.mark.usefixtures("quick_compilation")
KERNELS = matching("kernel|embedding")


def make_params():
    rng = np.random.default_rng(0)

    def draw(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "conv": {"kernel": draw(3, 3, 16, 24), "bias": draw(24)},
        "half": {"kernel": draw(33, 7, dtype=jnp.bfloat16)},
        "head": {"kernel": draw(24, 10)},
        "table": {"embedding": draw(50, 24)},
        "count": jnp.arange(5),
    }


CASES = {
    "same": top_k(0.9, where=KERNELS),
    "int8": compose(top_k(0.8, where=KERNELS), fake_quant(8, where=KERNELS)),
    "int4": compose(top_k(0.8, where=KERNELS), fake_quant(4, where=KERNELS)),
}


def assert_same(got, expected):
    for ours, theirs in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("values", CASES)
def test_what_was_trained_for_comes_back_bit_for_bit(tmp_path, values):
    params = compress(make_params(), CASES[values]).params
    saved = save_packed(params, tmp_path / "file", values=values)
    assert saved.exact
    assert saved.file_bytes == (tmp_path / "file").stat().st_size
    assert_same(load_packed(tmp_path / "file", like=params), params)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_leading_bits_are_the_nested_models(tmp_path, bits):
    params = {"kernel": make_params()["conv"]["kernel"]}
    save_packed(compress(params, nested(8)).params, tmp_path / "file", values="int8")
    got = load_packed(tmp_path / "file", like=params, bits=bits)
    expected = compress(params, nested(bits)).params
    # The same integers; the scale is a product here and a quotient there.
    np.testing.assert_allclose(got["kernel"], expected["kernel"], rtol=3e-7)
    with pytest.raises(ValueError, match="bits must be between 2 and 8, got 1"):
        load_packed(tmp_path / "file", bits=1)


@given(strategies.trees(), st.sampled_from(["same", "float16", "int8", "int4"]))
def test_any_tree_comes_back_as_near_as_its_values_allow(
    tmp_path_factory, params, values
):
    path = tmp_path_factory.mktemp("files") / "file"
    saved = save_packed(params, path, values=values)
    again = load_packed(path, like=params)
    errors = []
    for ours, theirs in zip(*map(jax.tree.leaves, (again, params)), strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.float64(ours), np.float64(theirs)
        step = {"same": 0.0, "float16": 2.0**-11, "int8": 0.51 / 127, "int4": 0.51 / 7}
        allowed = step[values] * np.abs(theirs).max() if theirs.ndim > 1 else 0
        # Results are in the leaf's dtype: half a unit of bfloat16 more.
        allowed += 0 if values == "same" else 2.0**-8 * np.abs(theirs)
        errors.append(np.abs(ours - theirs))
        assert (errors[-1] <= allowed).all()
        assert (ours[theirs == 0] == 0).all()
    assert saved.exact == all((error == 0).all() for error in errors)


@pytest.mark.parametrize(
    ("values", "share"), [("same", 0.12), ("float16", 0.07), ("int8", 0.05)]
)
def test_ninety_per_cent_zeros_take_a_tenth_of_the_file(tmp_path, values, share):
    # 10 % of the values and at most 0.49 bits an entry for the mask.
    kernel = np.random.default_rng(0).standard_normal((3, 3, 128, 128), np.float32)
    params = compress({"kernel": jnp.asarray(kernel)}, top_k(0.9)).params
    saved = save_packed(params, tmp_path / "file", values=values)
    assert saved.file_bytes < share * saved.dense_bytes


def test_the_same_parameters_give_the_same_bytes(tmp_path):
    params = compress(make_params(), CASES["int8"]).params
    for name in ("one", "two"):
        save_packed(params, tmp_path / name, values="int8")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_other_tools_read_what_is_not_packed(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    params = compress(make_params(), CASES["same"]).params
    save_packed(params, tmp_path / "file")
    theirs = library.load_file(tmp_path / "file")
    np.testing.assert_array_equal(theirs["conv/bias"], params["conv"]["bias"])
    np.testing.assert_array_equal(theirs["count"], params["count"])
    kernel = np.asarray(params["conv"]["kernel"]).reshape(-1)
    np.testing.assert_array_equal(theirs["conv/kernel:values"], kernel[kernel != 0])


def test_leaves_are_converted_and_read_one_at_a_time(tmp_path):
    alive = set()

    class Lazy:
        shape, dtype = (64, 32), np.dtype(np.float32)

        def __init__(self, name):
            self.name = name

        def __array__(self, dtype=None, copy=None):
            alive.add(self.name)
            assert len(alive) == 1, f"{alive} at once"
            array = np.random.default_rng(0).standard_normal(self.shape)
            array = array.astype(np.float32).view(_Watched)
            array.forget = lambda: alive.discard(self.name)
            return array

    params = {name: {"kernel": Lazy(name)} for name in "abc"}
    save_packed(params, tmp_path / "file")
    file = PackedFile(tmp_path / "file")
    assert list(file) == ["a/kernel", "b/kernel", "c/kernel"]
    assert file.shapes["b/kernel"] == (64, 32)
    assert file["c/kernel"].dtype == file.dtypes["c/kernel"] == np.float32
    with pytest.raises(KeyError):
        file["d/kernel"]


class _Watched(np.ndarray):
    """Tells when it is gone."""

    def __del__(self):
        if hasattr(self, "forget"):
            self.forget()


def test_an_error_leaves_nothing_behind_and_what_was_there_untouched(tmp_path):
    path = tmp_path / "file"
    save_packed(make_params(), path)
    before = path.read_bytes()
    broken = make_params() | {"zz": np.array(["text"])}
    with pytest.raises(TypeError, match="array .* must be of .*float32.*, got <U4"):
        save_packed(broken, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"values": "int2"}, "values must be 'same', .* or 'int4', got 'int2'"),
        ({"big": jnp.full((4, 4), 1e6)}, {"values": "float16"}, "'big' is out of the"),
        (
            {"nan": jnp.full((4, 4), jnp.nan)},
            {"values": "int8"},
            "'nan' must be finite to be stored as integers",
        ),
        ({"..": jnp.ones(3)}, {}, "must be named by a path such as"),
        ({"a:values": jnp.ones(3)}, {}, "must be named by a path such as"),
        ({"count/": jnp.ones(3)}, {}, "must be named by a path such as"),
        ({"__metadata__": jnp.ones(3)}, {}, "no array can be called '__metadata__'"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, change, options, message):
    with pytest.raises(ValueError, match=message):
        save_packed(make_params() | change, tmp_path / "file", **options)
    assert not list(tmp_path.iterdir())


def test_a_single_array_and_a_key_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="params, a single array, must be named by"):
        save_packed(jnp.ones(3), tmp_path / "file")
    with pytest.raises(TypeError, match="dropout/key is a PRNG key"):
        save_packed({"dropout": {"key": jax.random.key(0)}}, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_leaves_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two arrays are called 'a/b'"):
        save_packed({"a": {"b": jnp.ones(3)}, "a/b": jnp.ones(3)}, tmp_path / "file")


def test_a_tree_of_another_form_is_refused(tmp_path):
    save_packed(make_params(), tmp_path / "file")
    other = make_params()
    other["head"] = {"kernel": jnp.ones((24, 11))}
    message = r"'head/kernel' is \(24, 10\) in the file and \(24, 11\) there"
    with pytest.raises(ValueError, match=message):
        load_packed(tmp_path / "file", like=other)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The header and the data of a file."""
    path = tmp_path_factory.mktemp("packed") / "file"
    save_packed(compress(make_params(), CASES["int4"]).params, path, values="int4")
    content = path.read_bytes()
    size = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:size]), content[size:]


def write(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_layout(header, **changes):
    layout = json.loads(header["__metadata__"]["layout"])
    layout["conv/kernel"] |= changes
    metadata = header["__metadata__"] | {"layout": json.dumps(layout)}
    return header | {"__metadata__": metadata}


LAYOUTS = {
    "a shape too large": ({"shape": [2**40]}, "cannot be of a file of"),
    "another shape": ({"shape": [3, 3, 16, 23]}, "leaf 'conv/kernel': its mask"),
    "a negative shape": ({"shape": [-1, 2]}, r"has shape \[-1, 2\]"),
    "no shape": ({"shape": None}, "has shape None"),
    "too many kept": ({"kept": 3457}, "keeps 3457 of 3456 entries"),
    "another count": ({"kept": 600}, "leaf 'conv/kernel': its"),
    "a foreign mask": ({"mask": "runs"}, "mask of leaf 'conv/kernel' must be"),
    "foreign values": ({"values": "float8"}, "values of leaf 'conv/kernel' must be"),
    "other values": ({"values": "float32"}, "belongs to no leaf"),
    "a foreign dtype": ({"dtype": "object"}, "dtype of leaf 'conv/kernel' must be"),
    "no mask": ({"mask": "", "kept": 3456}, "belongs to no leaf"),
    "more": ({"more": 1}, "must have"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_that_lies_is_refused(tmp_path, packed, case):
    changes, message = LAYOUTS[case]
    write(tmp_path / "file", change_layout(packed[0], **changes), packed[1])
    with pytest.raises(ValueError, match=message):
        load_packed(tmp_path / "file")


def renamed(header, name):
    header = dict(header)
    header[name] = header.pop("conv/bias")
    return header


def with_offsets(header, offsets):
    return header | {"conv/bias": header["conv/bias"] | {"data_offsets": offsets}}


HEADERS = {
    "a path above": (lambda h: renamed(h, "../../bias"), "must be named by a path"),
    "an absolute path": (lambda h: renamed(h, "/bias"), "must be named by a path"),
    "a drive": (lambda h: renamed(h, "c:\\bias"), "belongs to no leaf"),
    "a line break": (lambda h: renamed(h, "a\nb"), "must be named by a path"),
    "offsets beyond": (lambda h: with_offsets(h, [0, 2**40]), "does not fit"),
    "offsets reversed": (lambda h: with_offsets(h, [96, 0]), "does not fit"),
    "offsets below": (lambda h: with_offsets(h, [-96, 0]), "has shape"),
    "overlap": (lambda h: with_offsets(h, [96, 192]), "overlap or leave a gap"),
    "foreign": (lambda h: h | {"__metadata__": {"format": "pt"}}, "do not say"),
    "numbers": (lambda h: h | {"__metadata__": {"format": 1}}, "not texts by name"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, packed, case):
    change, message = HEADERS[case]
    write(tmp_path / "file", change(packed[0]), packed[1])
    with pytest.raises(ValueError, match=message):
        load_packed(tmp_path / "file")


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, packed, length):
    path = tmp_path / "file"
    write(path, *packed)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="is not packed: "):
        PackedFile(path)


@hypothesis.settings(max_examples=200)
@given(st.data())
def test_damage_is_an_error_or_another_number(tmp_path_factory, packed, data):
    path = tmp_path_factory.mktemp("files") / "file"
    write(path, *packed)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        load_packed(path)


def test_a_name_twice_in_a_header_is_refused(tmp_path):
    content = safetensors.encode({"a": np.ones(2, np.float32)}, {})
    twice = content[8:].replace(b'"__metadata__": {}', b'"a": {}, "b": {}, "b": {}')
    size = len(content) - 8 - 8
    grown = len(twice) - (len(content) - 8)
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", size + grown) + twice)
    with pytest.raises(ValueError, match="a name twice"):
        safetensors.File(path)


def test_a_file_that_several_write_is_always_whole(tmp_path):
    path = tmp_path / "network.safetensors"
    content = {"a": np.arange(300_000, dtype=np.float32)}
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(save_packed, content, path) for _ in range(12)]
        while not all(write.done() for write in writes):
            if path.exists():
                np.testing.assert_array_equal(load_packed(path)["a"], content["a"])
    for write in writes:
        write.result()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_is_missing_is_named(tmp_path):
    path = tmp_path / "missing" / "network.safetensors"
    with pytest.raises(FileNotFoundError, match=r"network.* no folder '.*missing'"):
        save_packed({"a": np.ones(2, np.float32)}, path)
