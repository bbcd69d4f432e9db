"""ONNX files compute what the graph computes, in two runtimes."""

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engine.networks import convolutional, pointwise, sparse, transformer

from cram_jax import engine
from cram_jax.export import (
    ParityError,
    check_parity,
    n_m_layers,
    onnx_inputs,
    run_onnx,
    to_onnx,
)
from cram_jax.export.extras import quiet, require

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

# Importing OpenVINO starts a process, of which jax warns.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")
NETWORKS = {f.__name__: f for f in (convolutional, transformer, pointwise)}


@pytest.fixture(scope="module")
def examples():
    """For every network its graph, inputs, and outputs in float64."""
    found = {}
    for name, make in NETWORKS.items():
        graph, inputs = make(np.random.default_rng(1))
        values = engine.interpret(graph, *inputs)
        found[name] = graph, inputs, tuple(values[name] for name in graph.outputs)
    return found


def run_openvino(graph, path, inputs):
    openvino = pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}

    def run():
        model = openvino.Core().compile_model(path, "CPU", settings)
        results = model(onnx_inputs(graph, inputs))
        return tuple(results[index] for index in range(len(graph.outputs)))

    # As in `experiments.deployment.peers`: it changes where a thread takes signals.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.mark.parametrize("name", NETWORKS)
def test_both_runtimes_give_the_graph_s_numbers(examples, tmp_path, name):
    graph, inputs, expected = examples[name]
    path = tmp_path / "network.onnx"
    to_onnx(graph, path)
    # Float32 against float64: some units in the last place.
    check_parity(run_onnx(graph, path)(*inputs), expected, 1e-6)
    check_parity(run_openvino(graph, path, inputs), expected, 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_and_length_are_free(examples, tmp_path, name):
    graph, inputs, _ = examples[name]
    to_onnx(graph, tmp_path / "network.onnx")
    run = run_onnx(graph, tmp_path / "network.onnx")
    one = [x[:1, :4] if x.ndim < 4 else x[:1] for x in inputs]
    values = engine.interpret(graph, *one)
    check_parity(run(*one), tuple(values[name] for name in graph.outputs), 1e-6)


def test_only_plain_operators_of_opset_17(examples, tmp_path):
    kinds = set()
    for name, (graph, _, _) in examples.items():
        to_onnx(graph, tmp_path / f"{name}.onnx")
        model = onnx.load(tmp_path / f"{name}.onnx")
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
        kinds |= {node.op_type for node in model.graph.node}
    assert {"Conv", "MatMul", "Gemm", "LayerNormalization", "MaxPool"} <= kinds
    assert not {"BatchNormalization", "Einsum"} & kinds


def test_batch_norm_is_folded_unless_another_node_needs_the_layer(tmp_path):
    rng = np.random.default_rng(0)
    network = engine.GraphBuilder()
    x = network.add(engine.Input((5, 5, 3)), name="image")
    y = network.add(engine.Conv(sparse(rng, 3, 3, 3, 4)), x, name="conv")
    scaled = network.add(engine.batch_norm(np.ones(4), np.full(4, 2.0)), y)
    once = network.build(network.add(engine.Relu(), scaled))
    twice = network.build(network.add(engine.Add(), scaled, y))
    images = rng.standard_normal((2, 5, 5, 3)).astype(np.float32)
    for graph, operators in ((once, ["Conv", "Relu"]), (twice, None)):
        to_onnx(graph, tmp_path / "network.onnx")
        model = onnx.load(tmp_path / "network.onnx")
        if operators:
            assert [node.op_type for node in model.graph.node] == operators
        got = run_onnx(graph, tmp_path / "network.onnx")(images)
        expected = engine.interpret(graph, images)[graph.outputs[0]]
        check_parity(got, expected, 1e-6)


@pytest.mark.parametrize("name", ["convolutional", "transformer"])
def test_int8_is_near_and_files_are_deterministic(examples, tmp_path, name):
    graph, inputs, expected = examples[name]
    level = logging.root.level
    for path in (tmp_path / "one.onnx", tmp_path / "two.onnx"):
        to_onnx(graph, path, bits=8, calibration=[inputs])
    assert logging.root.level == level
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    kinds = {n.op_type for n in onnx.load(tmp_path / "one.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    got = run_onnx(graph, tmp_path / "one.onnx")(*inputs)
    check_parity(got, expected, 0.05)
    # OpenVINO adds pairs of products in 16 bits where there is no VNNI: with the few
    # inputs of a convolution here nothing saturates.
    if name == "convolutional":
        got = run_openvino(graph, tmp_path / "one.onnx", inputs)
        check_parity(got, expected, 0.05)


@pytest.mark.parametrize("calibrated", [False, True])
def test_an_input_may_be_an_output(tmp_path, calibrated):
    network = engine.GraphBuilder()
    x = network.add(engine.Input((4, 4, 3)), name="x")
    y = network.add(engine.Conv(np.ones((1, 1, 3, 2))), x)
    graph = network.build(y, x)
    images = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    options = {"bits": 8, "calibration": [images]} if calibrated else {}
    to_onnx(graph, tmp_path / "network.onnx", **options)
    got = run_onnx(graph, tmp_path / "network.onnx")(images)
    check_parity(got, (images.sum(-1, keepdims=True).repeat(2, -1), images), 0.05)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.2), (8, 0.02)])
def test_linear_layers_in_blocks_of_few_bits(examples, tmp_path, bits, tolerance):
    graph, inputs, expected = examples["transformer"]
    to_onnx(graph, tmp_path / "few.onnx", bits=bits)
    model = onnx.load(tmp_path / "few.onnx")
    packed = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(packed) == 8
    got = run_onnx(graph, tmp_path / "few.onnx")(*inputs)
    difference = check_parity(got, expected, tolerance)
    assert difference > 1e-4  # it was rounded


def test_two_of_four_is_checked_group_by_group(tmp_path):
    rng = np.random.default_rng(0)

    def halved(*shape):
        kernel = rng.standard_normal(shape)
        kernel[..., 0::4, :] = kernel[..., 3::4, :] = 0
        return kernel

    network = engine.GraphBuilder()
    x = network.add(engine.Input((5, 5, 8)), name="image")
    x = network.add(engine.Conv(halved(3, 3, 8, 8)), x, name="good")
    spoilt = halved(3, 3, 8, 8)
    spoilt[1, 2, 4, 5] = 1.0
    x = network.add(engine.Conv(spoilt), x, name="spoilt")
    x = network.add(engine.Conv(halved(1, 1, 8, 6)), x, name="six")
    x = network.add(engine.Mean(), x)
    x = network.add(engine.Linear(rng.standard_normal((6, 3))), x, name="head")
    graph = network.build(x)
    to_onnx(graph, tmp_path / "network.onnx")
    found = n_m_layers(tmp_path / "network.onnx", 2, 4)
    assert found == {
        "good.weight": True,
        "spoilt.weight": False,
        "six.weight": True,
        "head.weight": False,
    }
    images = rng.standard_normal((2, 5, 5, 8)).astype(np.float32)
    to_onnx(graph, tmp_path / "int8.onnx", bits=8, calibration=[images])
    found = n_m_layers(tmp_path / "int8.onnx", 2, 4)
    assert list(found.values()) == [True, False, True, False]


@pytest.mark.parametrize("bits", [4, 8])
def test_two_of_four_is_checked_in_blocks_of_few_bits(tmp_path, bits):
    kernel = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    kernel[0::4] = kernel[3::4] = 0
    spoilt = kernel.copy()
    spoilt[8, 1] = 3.0
    network = engine.GraphBuilder()
    x = network.add(engine.Input((40,)))
    good = network.add(engine.Linear(kernel), x, name="good")
    bad = network.add(engine.Linear(spoilt), x, name="bad")
    to_onnx(network.build(good, bad), tmp_path / "network.onnx", bits=bits)
    found = n_m_layers(tmp_path / "network.onnx", 2, 4)
    assert found == {"good.weight": True, "bad.weight": False}


def test_any_mask_that_is_not_zero_is_attended(tmp_path):
    network = engine.GraphBuilder()
    x = network.add(engine.Input((4, 8)))
    mask = network.add(engine.Input((4,), "int32"))
    graph = network.build(network.add(engine.Attention(2), x, x, x, mask))
    to_onnx(graph, tmp_path / "network.onnx")
    x = np.random.default_rng(0).standard_normal((1, 4, 8))
    inputs = x, np.array([[1, 1, 2, 0]])
    expected = engine.interpret(graph, *inputs)[graph.outputs[0]]
    check_parity(run_onnx(graph, tmp_path / "network.onnx")(*inputs), expected, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits must be 4, 8 or 32, got 5"),
        ({"bits": 8, "calibration": []}, "batches must not be empty"),
        ({"bits": 4, "calibration": [1]}, "a calibration needs bits=8, got bits=4"),
        ({"calibration": [1]}, "a calibration needs bits=8, got bits=32"),
        (
            {"bits": 8, "calibration": engine.Calibration([1], "percentile")},
            "calibration must be of method 'minmax' for ONNX, got 'percentile'",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(examples, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        to_onnx(examples["pointwise"][0], tmp_path / "x.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_what_is_no_graph_is_refused(examples, tmp_path):
    run = engine.compile(examples["pointwise"][0])
    with pytest.raises(TypeError, match="graph must be a Graph, got Engine"):
        to_onnx(run, tmp_path / "x.onnx")


def test_an_operation_without_a_form_is_named(tmp_path):
    @engine.operations.operation
    class Strange(engine.Operation):
        def infer(self, *inputs):
            return inputs[0]

    network = engine.GraphBuilder()
    x = network.add(engine.Input((3,)), name="x")
    graph = network.build(network.add(Strange(), x, name="odd"))
    with pytest.raises(ValueError, match="node 'odd': Strange has no form in ONNX"):
        to_onnx(graph, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_threads_that_silence_packages_at_once_restore_what_was_there():
    """Else the last one to end would restore the silence of the other."""
    before = sys.stderr, logging.root.manager.disable
    begun, met = threading.Event(), threading.Event()

    def wait():
        with quiet():
            begun.set()
            met.wait(0.2)

    def meet():
        begun.wait()
        with quiet():
            met.set()
            first.join()

    first, second = threading.Thread(target=wait), threading.Thread(target=meet)
    first.start(), second.start()
    second.join()
    assert (sys.stderr, logging.root.manager.disable) == before


def test_a_missing_package_is_one_line():
    message = r"needs cram_jax_missing: pip install 'cram_jax\[onnx\]'"
    with pytest.raises(ImportError, match=message):
        require("cram_jax_missing.part", "onnx")


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ([1.0, 2.1], r"int8 differs from JAX by 0.05 of the largest output, above"),
        ([1.0, np.nan], "differs from JAX by nan"),
        ([1.0], r"returns shape \(1,\), expected \(2,\)"),
        (([1.0, 2.0], [1.0]), "returns 2 arrays, expected 1"),
    ],
)
def test_other_numbers_are_an_error(got, message):
    with pytest.raises(ParityError, match=message):
        check_parity(got, [1.0, 2.0], 0.01, "int8")
