"""Every operation on every instruction set, beside float64 and exact integers."""

import dataclasses
import math

import numpy as np
import pytest
from engine.networks import convolutional, pointwise, transformer
from engine.references import integer_attention, integer_product

from cram_jax import engine
from cram_jax.engine import jit, kernels, llvm
from cram_jax.engine.buffers import Step
from cram_jax.engine.executor import Program
from cram_jax.engine.kernels import pooling
from cram_jax.engine.model import PackedProduct

NETWORKS = {f.__name__: f for f in (convolutional, transformer, pointwise)}


def here(target):
    """The set itself where the processor has it, else the same bits in plain LLVM."""
    return target if target.is_native() else target.emulated()


TARGETS = {name: here(target) for name, target in engine.TARGETS.items()}


def build(name):
    return NETWORKS[name](np.random.default_rng(0))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_that_of_float64_numpy(name, target):
    graph, inputs = build(name)
    expected = engine.interpret(graph, *inputs)
    for node, values in engine.compile(graph, target=target).tensors(*inputs).items():
        largest = np.abs(expected[node]).max()
        np.testing.assert_allclose(
            values, expected[node], rtol=1e-5, atol=1e-5 * largest, err_msg=node
        )


def activated(operation, x, target):
    """What an activation makes of a vector of numbers."""
    network = engine.GraphBuilder()
    y = network.add(operation, network.add(engine.Input((len(x),))))
    return engine.compile(network.build(y), target=target)(x[None])[0]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_tanh_is_exact_to_a_few_units_in_the_last_place(target):
    x = np.concatenate([np.geomspace(1e-8, 20, 3000), np.linspace(0.5, 0.8, 2000)])
    x = np.concatenate([x, -x, [1e-40, 1e20, np.inf]]).astype(np.float32)
    y = activated(engine.Tanh(), x, target)
    # The smallest of 1 - 2 / (exp(2x) + 1) is about 1/2, with roundings of 1.
    np.testing.assert_allclose(y, np.tanh(x.astype(np.float64)), rtol=4e-7)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_gelu_of_what_is_far_below_zero_is_nearly_zero(target):
    x = np.concatenate([np.geomspace(1e-8, 1e8, 3000), np.linspace(3, 7, 2000)])
    x = np.concatenate([x, -x, [0]]).astype(np.float32)
    expected = [v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.astype(np.float64)]
    error = np.abs(activated(engine.Gelu(), x, target) - expected)
    assert error[x < 0].max() <= 1.1e-6
    assert (error / np.maximum(1, np.abs(x))).max() <= 5e-7


@pytest.mark.parametrize("operation", [engine.Tanh(), engine.Gelu()])
def test_activations_of_what_is_not_a_number_are_none(operation):
    for x in (np.nan, -np.nan, np.uint32(0x7FC00001).view(np.float32)):
        assert np.isnan(activated(operation, np.full(5, x, np.float32), None)).all()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", ["convolutional", "transformer"])
def test_int8_products_are_those_of_exact_integers(name, target):
    graph, inputs = build(name)
    compiled = engine.compile(graph, calibration=[inputs], target=target)
    tensors = compiled.tensors(*inputs)
    ranges = compiled.model.ranges

    def octets(node):
        return np.rint(tensors[node] / ranges[node].scale) + ranges[node].zero

    compared = 0
    for node in compiled.model.graph.nodes:
        product = node.operation
        if not isinstance(product, PackedProduct) or product.activation in (
            "gelu",
            "tanh",
        ):
            continue
        forms = compiled.model.forms
        source = node.inputs[0]
        x = tensors[source]
        if "f32" in forms[source] or source == "image":
            # Not bytes yet: quantised on the way in.
            what = ranges[source]
            inverse = np.float32(1) / np.float32(what.scale)
            x = np.clip(np.rint(x * inverse + np.float32(what.zero)), 0, 255)
        else:
            x = octets(source)
        residual = None
        for other in node.inputs[1:]:
            is_float = "f32" in forms[other]
            residual = tensors[other] if is_float else (octets(other), ranges[other])
        is_octets = forms[node.name] == {"u8"}
        expected = integer_product(
            product,
            x.astype(np.uint8),
            ranges[source],
            y_range=ranges[node.name] if is_octets else None,
            residual=residual,
        )
        got = octets(node.name) if is_octets else tensors[node.name]
        np.testing.assert_array_equal(got, expected, err_msg=node.name)
        compared += 1
    assert compared >= 5


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_largest_bytes_times_the_largest_weights_are_exact(target):
    """Two such products exceed the 16 bits of some instructions."""
    signs = np.array([[1, 1, -1, -1], [1, -1, -1, -1], [1, 1, 1, 1]]).repeat(2, axis=1)
    network = engine.GraphBuilder()
    x = network.add(engine.Input((8,)), name="x")
    logits = network.add(engine.Linear(signs.T.astype(np.float32)), x)
    x = np.tile([[1.0], [0.2], [0.0]], 8).astype(np.float32)
    run = engine.compile(network.build(logits), calibration=[x], target=target)
    (weights,) = (
        node.operation.weights
        for node in run.model.graph.nodes
        if isinstance(node.operation, PackedProduct)
    )
    assert set(np.abs(weights.values[weights.values != 0])) == {127}
    expected = np.rint(255 * x) @ (127 * signs.T) / (127 * 255)
    np.testing.assert_allclose(run(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("length", [1, 19])
def test_int8_attention_is_that_of_exact_integers(length, target):
    """Padding, a sequence of nothing else, and lengths that four does not divide."""
    graph, inputs = transformer(np.random.default_rng(1), length)
    compiled = engine.compile(graph, calibration=[inputs], target=target)
    tensors, ranges = compiled.tensors(*inputs), compiled.model.ranges
    node = compiled.model.graph["attended"]
    operands = [
        np.rint(tensors[name] / ranges[name].scale) + ranges[name].zero
        for name in node.inputs[:3]
    ]
    expected = integer_attention(
        node.operation.heads,
        *operands,
        [ranges[name] for name in node.inputs[:3]],
        tensors[node.inputs[3]],
        ranges["attended"],
    )
    got = np.rint(tensors["attended"] / ranges["attended"].scale)
    np.testing.assert_array_equal(got + ranges["attended"].zero, expected)


def sums_of_bytes(x, columns, target):
    """The sums of four channels (positions, 4), from the kernel of means.

    It reads whole vectors, beyond the columns that it adds up.
    """
    assert len(x) >= columns + 15
    y = np.zeros((4, 1), np.float32)
    words = {"x": x, "y": y, "stride": 1, "rows": 1, "items": 1, "columns": columns}
    words |= {"jobs": 1, "scale": 1 / 1024}
    Program([Step("mean", kernels.MeanOfImages(True), words, 1)], target, 1).run()
    return 1024 * y[:, 0]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_sum_of_bytes_may_exceed_32_bits(target):
    columns = 2**31 // 255 + 25
    x = np.full((columns + 15, 4), 255, np.uint8)
    x[:, 1] = 254
    expected = x[0] * np.float64(columns)
    assert expected[0] > 2**31
    np.testing.assert_allclose(sums_of_bytes(x, columns, target), expected, rtol=1e-7)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_sum_of_bytes_in_blocks_is_exact(target, monkeypatch):
    monkeypatch.setattr(pooling, "_BLOCK", 3)
    target = dataclasses.replace(target, name="blocks")  # to be compiled for itself
    x = np.random.default_rng(0).integers(0, 256, (252, 4), np.uint8)
    for columns in (1, 47, 48, 49, 237):
        y = sums_of_bytes(x, columns, target)
        np.testing.assert_array_equal(y, x[:columns].sum(0, np.int64))


@pytest.mark.parametrize("name", ["convolutional", "transformer"])
def test_int8_is_close_to_float64(name):
    graph, inputs = build(name)
    expected = engine.interpret(graph, *inputs)
    compiled = engine.compile(graph, calibration=[inputs])
    for node, values in compiled.tensors(*inputs).items():
        error = np.linalg.norm(values - expected[node])
        assert error <= 0.05 * np.linalg.norm(expected[node]), node


@pytest.mark.parametrize(
    ("name", "cpu", "instruction"),
    [
        ("avx512vnni", "icelake-server", "vpdpbusd"),
        ("avx512vnni", "znver4", "vpdpbusd"),
        ("avx512", "skylake-avx512", "vpmaddubsw"),
        ("avx2vnni", "alderlake", "vpdpbusd"),
        ("avx2", "haswell", "vpmaddubsw"),
    ],
)
def test_the_instruction_of_a_set_is_what_is_compiled(name, cpu, instruction):
    target = engine.TARGETS[name]
    spec = kernels.SparseProduct(True, 2, 2, "u8", "u8", "relu", False, True)
    if not llvm.is_x86():
        pytest.skip("the instruction is of x86")
    text, _ = jit.write_kernels([spec], target)
    listing = llvm.assembly(text, cpu, jit.features(target))
    register = "zmm" if target.lanes == 16 else "ymm"
    lines = [line for line in listing.splitlines() if instruction in line]
    assert len(lines) >= 2 * spec.rows * spec.tile
    assert all(register in line for line in lines)
    # What was meant for a register does not go through memory.
    assert "packuswb" in listing
