"""An engine as its users meet it: calls, errors, threads, forks, JAX, profiles."""

import os
import subprocess
import sys
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.networks import convolutional, sparse, transformer
from hypothesis import given, settings
from hypothesis import strategies as st

from cram_jax import engine


@pytest.fixture(scope="module")
def images():
    """A convolution network, its inputs and its INT8 engine."""
    graph, inputs = convolutional(np.random.default_rng(2))
    return graph, inputs, engine.compile(graph, calibration=[inputs])


@pytest.fixture(scope="module")
def texts():
    """A transformer, its inputs and its INT8 engine."""
    graph, inputs = transformer(np.random.default_rng(2))
    return graph, inputs, engine.compile(graph, calibration=[inputs])


def all_equal(got, expected):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_an_item_does_not_depend_on_its_batch(images):
    _, (x,), run = images
    together = run(x)
    for i in range(len(x)):
        all_equal(run(x[i : i + 1]), [y[i : i + 1] for y in together])
    assert [y.shape for y in run(x[:0])] == [(0, 7), (0, 12), (0, 7)]


def test_a_token_does_not_depend_on_padding(texts):
    _, (ids, _), run = texts
    short = run(ids[:, :7], np.ones((3, 7), int))
    mask = np.zeros(ids.shape, int)
    mask[:, :7] = 1
    for padded, exact in zip(run(ids, mask), short, strict=True):
        padded = padded[:, :7] if padded.ndim == 3 else padded
        np.testing.assert_allclose(padded, exact, atol=0.02 * np.abs(exact).max())


def test_float32_with_padding_is_float32_without(texts):
    graph, (ids, _), _ = texts
    run = engine.compile(graph)
    short = run(ids[:, :7], np.ones((3, 7), int))
    mask = np.zeros(ids.shape, int)
    mask[:, :7] = 1
    for padded, exact in zip(run(ids, mask), short, strict=True):
        padded = padded[:, :7] if padded.ndim == 3 else padded
        np.testing.assert_allclose(padded, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("number", [True, -1, 2**31, 2**32, 2**40])
def test_a_mask_is_zero_or_it_is_not(texts, number):
    _, (ids, mask), run = texts
    all_equal(run(ids, mask * np.asarray(number)), run(ids, mask))


def test_images_may_be_of_half_the_bits(images):
    _, (x,), run = images
    for dtype in (jnp.bfloat16, np.float16):
        half = x.astype(dtype)
        all_equal(run(half), run(half.astype(np.float32)))


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_give_the_same_bits(images, texts, threads):
    for graph, inputs, run in (images, texts):
        expected = run(*inputs)
        several = engine.compile(graph, calibration=[inputs], threads=threads)
        for _ in range(20):
            all_equal(several(*inputs), expected)


def test_calls_from_several_threads_are_safe(images, texts):
    failures = []

    def call(run, inputs, expected):
        try:
            for size in (1, 2, 3) * 4:
                cut = [x[:size] for x in inputs]
                all_equal(run(*cut), [y[:size] for y in expected])
        except Exception as error:
            failures.append(error)

    workers = []
    for graph, inputs, run in (images, texts):
        shared = engine.compile(graph, calibration=[inputs], threads=2)
        for callee in (shared, shared, run):
            arguments = (callee, inputs, run(*inputs))
            workers.append(threading.Thread(target=call, args=arguments))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def run_python(program):
    """Runs a program in a process of its own, with our modules."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )


_FORKS = """
import os, sys
import numpy as np
from engine.networks import convolutional
from cram_jax import engine
graph, inputs = convolutional(np.random.default_rng(2))
run = engine.compile(graph, calibration=[inputs], threads=3)
expected = run(*inputs)
run._lock.acquire()  # as another thread might hold it
child = os.fork()
same = all((x == y).all() for x, y in zip(run(*inputs), expected)) if not child else 1
if not child:
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


_FORKS_BESIDE_A_COMPILER = """
import os, sys, threading, time
import numpy as np
from engine.networks import convolutional
from cram_jax import engine
from cram_jax.engine import llvm
graph, inputs = convolutional(np.random.default_rng(2))
run = engine.compile(graph)
busy, code = True, []
def compile_more():
    while busy:
        code.append(llvm.compile_text("define void @f() { ret void }"))
thread = threading.Thread(target=compile_more)
thread.start()
children = []
for size in range(1, 5):
    time.sleep(0.02)
    child = os.fork()
    if not child:
        run(*(np.concatenate([x] * size)[: size + 3] for x in inputs))  # a new plan
        os._exit(0)
    children.append(child)
busy = False
thread.join()
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(any(codes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("program", [_FORKS, _FORKS_BESIDE_A_COMPILER])
def test_an_engine_works_after_a_fork(program):
    result = run_python(program)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda ids, mask: (ids,),
            ValueError,
            r"must be 2 arrays \(ids, mask\), got 1",
        ),
        (
            lambda ids, mask: (ids[0], mask),
            ValueError,
            r"input 'ids' must have shape \(batch, length\), got \(19,\)",
        ),
        (lambda ids, mask: (ids * 1.0, mask), TypeError, "input 'ids' must be int32"),
        (
            lambda ids, mask: (ids.astype(jnp.bfloat16), mask),
            TypeError,
            "input 'ids' must be int32, got bfloat16",
        ),
        (lambda ids, mask: (ids, mask[:, :3]), ValueError, "one length, got 19 and 3"),
        (lambda ids, mask: (ids, mask[:2]), ValueError, "one batch size, got 3 and 2"),
        (lambda ids, mask: (ids - 50, mask), ValueError, "ids from 0 to 49, got -"),
        (lambda ids, mask: (ids + 50, mask), ValueError, "ids from 0 to 49, got"),
        (lambda ids, mask: (ids + 2**32, mask), ValueError, "ids from 0 to 49, got 42"),
        (
            lambda ids, mask: (np.zeros((1, 51), int),) * 2,
            ValueError,
            "length must be at most 50",
        ),
        (
            lambda ids, mask: (ids[:, :0], mask[:, :0]),
            ValueError,
            "length must be from",
        ),
    ],
)
def test_wrong_inputs_are_named(texts, change, error, message):
    _, inputs, run = texts
    with pytest.raises(error, match=message):
        run(*change(*inputs))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threads": 0}, ValueError, "threads must be between 1 and 256, got 0"),
        ({"target": "sse"}, ValueError, "target must be one of 'avx512vnni'"),
        ({"calibration": []}, ValueError, "batches must not be empty"),
        ({"calibration": np.ones(3)}, TypeError, "calibration must be an iterable of"),
        ({"calibration": True}, TypeError, "calibration must be .*, got a bool"),
    ],
)
def test_wrong_options_are_named(images, options, error, message):
    with pytest.raises(error, match=message):
        engine.compile(images[0], **options)


def test_an_instruction_set_that_is_missing_is_refused(images):
    missing = [t for t in engine.TARGETS.values() if not t.is_native()]
    if not missing:
        pytest.skip("this processor has all of them")
    with pytest.raises(ValueError, match=f"target '{missing[0].name}' needs"):
        engine.compile(images[0], target=missing[0].name)


def test_it_is_one_call_inside_jit(images, texts):
    for _, inputs, run in (images, texts):
        call = run.as_jax()
        twice = jax.jit(lambda *x, f=call: jax.tree.map(jnp.add, f(*x), f(*x)))
        all_equal(twice(*inputs), [2 * y for y in run(*inputs)])


@pytest.mark.parametrize("make", [convolutional, transformer])
def test_an_engine_keeps_its_weights_when_the_caller_s_arrays_change(make):
    graph, inputs = make(np.random.default_rng(0))
    for calibration in (None, [inputs]):
        run = engine.compile(graph, calibration=calibration)
        before = run(*inputs)
        arrays = [
            value
            for node in graph.nodes
            for value in vars(node.operation).values()
            if isinstance(value, np.ndarray)
        ]
        for array in arrays:
            array += 1
        all_equal(run(*inputs), before)
        # A batch of another size reads the biases again.
        all_equal(run(*(x[:1] for x in inputs)), [y[:1] for y in before])


def test_a_profile_counts_what_is_not_skipped():
    kernel = np.zeros((8, 8), np.float32)
    kernel[:4, :2] = 1
    network = engine.GraphBuilder()
    x = network.add(engine.Input((8,)))
    graph = network.build(network.add(engine.Linear(kernel), x, name="layer"))
    batch = np.ones((64, 8), np.float32)
    run = engine.compile(graph, calibration=[batch])
    (entry,) = [e for e in run.profile(batch) if e.name == "layer"]
    # One block of 4 x 2, or, with 4 outputs to a group, of 4 x 4.
    assert entry.multiply_adds in (64 * 8, 64 * 16)
    assert entry.kind == "PackedProduct"
    assert entry.seconds > 0
    assert "layer" in str(run.profile(batch, repeats=1))


def test_tuning_changes_tiles_and_nothing_else(images, tmp_path, monkeypatch):
    graph, inputs, run = images
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned = engine.compile(graph, calibration=[inputs])
    tuned.tune(*inputs, repeats=1)
    all_equal(tuned(*inputs), run(*inputs))
    (written,) = (tmp_path / "cram_jax").iterdir()
    again = engine.compile(graph, calibration=[inputs])
    assert again._tiles._tiles == tuned._tiles._tiles != {}
    written.write_text("{not json")
    assert engine.compile(graph, calibration=[inputs])._tiles._tiles == {}
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # cannot hold a folder
    engine.compile(graph, calibration=[inputs]).tune(*inputs, repeats=1)


def linear(size):
    """A network of one layer, and inputs for it."""
    network = engine.GraphBuilder()
    x = network.add(engine.Input((size,)))
    graph = network.build(network.add(engine.Linear(np.eye(size)), x))
    return graph, np.ones((4, size), np.float32)


def test_engines_keep_the_tiles_that_others_measured():
    networks = [linear(8), linear(12)]
    runs = [engine.compile(graph) for graph, _ in networks]
    for run, (_, x) in zip(runs, networks, strict=True):
        run.tune(x, repeats=1)
    found = engine.compile(networks[0][0])._tiles._tiles
    outputs = [key.split()[4].partition("x")[0] for key in found]
    assert sorted(outputs) == ["12", "8"]


def test_a_user_without_a_home_can_tune_too(monkeypatch):
    users = pytest.importorskip("pwd")

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(users, "getpwuid", unknown)
    graph, x = linear(8)
    run = engine.compile(graph)
    run.tune(x, repeats=1)
    assert len(run._tiles._tiles) == 1
    np.testing.assert_array_equal(run(x), x)


def test_attention_may_stay_in_float32(texts):
    graph, inputs, _ = texts
    floating = engine.compile(graph)(*inputs)[0]
    errors = {}
    for kind in ("int8", "float32"):
        run = engine.compile(graph, calibration=[inputs], attention=kind)
        names = {type(node.operation).__name__ for node in run.model.graph.nodes}
        assert ("IntegerAttention" in names) == (kind == "int8")
        errors[kind] = np.abs(run(*inputs)[0] - floating).max()
    assert 0 < errors["float32"] <= errors["int8"]
    with pytest.raises(ValueError, match="attention must be 'int8' or 'float32'"):
        engine.compile(graph, calibration=[inputs], attention="int4")


def test_plans_for_many_batch_sizes_come_and_go(images):
    _, (image,), run = images
    x = np.resize(image, (12, *image.shape[1:]))
    whole = run(x)
    for count in (*range(1, 13), 1, 12):
        firsts = [tensor[:count] for tensor in jax.tree.leaves(whole)]
        chex.assert_trees_all_equal(jax.tree.leaves(run(x[:count])), firsts)
    assert len(run._plans) == 8


@given(data=st.data())
@settings(max_examples=25)
def test_any_convolution_is_that_of_float64_numpy(data):
    draw = data.draw
    sizes = st.integers(1, 9)
    height, width, inputs, outputs = (draw(sizes) for _ in range(4))
    window = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    strides = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    pads = [[draw(st.integers(0, side - 1)) for _ in range(2)] for side in window]
    fits = height + sum(pads[0]) >= window[0] and width + sum(pads[1]) >= window[1]
    padding = pads if fits else "SAME"
    block = draw(st.sampled_from([(1, 1), (4, 1), (4, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kernel = sparse(
        rng, *window, inputs, outputs, keep=draw(st.sampled_from([0.2, 1])), block=block
    )
    network = engine.GraphBuilder()
    x = network.add(engine.Input((height, width, inputs)))
    conv = engine.Conv(kernel, rng.standard_normal(outputs), strides, padding)
    graph = network.build(network.add(conv, x))
    images = rng.standard_normal((draw(st.integers(1, 3)), height, width, inputs))
    images = images.astype(np.float32)
    (expected,) = (engine.interpret(graph, images)[name] for name in graph.outputs)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        engine.compile(graph)(images), expected, rtol=1e-5, atol=1e-5 * scale
    )
    coarse = engine.compile(graph, calibration=[images])(images)
    # Each factor is off by half a step at most: of 255 for x, of 127 for weights.
    bound = np.abs(kernel).reshape(-1, outputs).sum(0) * np.ptp(images) / 255
    largest = np.abs(images).max() * np.abs(kernel).max()
    bound = bound + kernel[..., 0].size * largest / 127
    assert (np.abs(coarse - expected) <= bound + 1e-4).all()


_WITHOUT = """
import sys
sys.modules["llvmlite"] = None
import numpy as np
from cram_jax import engine
network = engine.GraphBuilder()
graph = network.build(network.add(engine.Relu(), network.add(engine.Input((2,)))))
assert "jax" not in sys.modules["cram_jax.engine.engine"].__dict__
try:
    engine.compile(graph)
except ImportError as error:
    print(error)
"""


def test_without_llvmlite_the_error_says_what_to_install():
    result = run_python(_WITHOUT)
    assert "pip install 'cram_jax[engine]'" in result.stdout
