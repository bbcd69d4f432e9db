"""Networks at the edge: dead layers, tiny channels, padding, single features."""

import numpy as np
import pytest
from engine.networks import pointwise

from cram_jax import engine


def normal(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def compare(make, shape, int8, tolerance):
    """Builds a network of one input, and compares the engine with float64 NumPy."""
    network = engine.GraphBuilder()
    graph = network.build(make(network, network.add(engine.Input(shape), name="x")))
    x = normal(5, *shape)
    compiled = engine.compile(graph, calibration=[x] if int8 else None)
    expected = engine.interpret(graph, x)[graph.outputs[0]]
    error = np.abs(compiled(x) - expected).max() / np.abs(expected).max()
    assert error <= tolerance
    return compiled, x


def dead(network, x):
    """All that is left of the first layer is a bias, which ReLU cuts off."""
    x = network.add(engine.Linear(np.zeros((6, 8)), -np.ones(8)), x)
    x = network.add(engine.Relu(), x)
    return network.add(engine.Linear(normal(8, 3), normal(3)), x)


def dead_branch(network, x):
    """The same in a residual block, whose other branch is alive."""
    y = network.add(engine.Conv(np.zeros((3, 3, 4, 4)), -np.ones(4)), x)
    y = network.add(engine.Conv(normal(3, 3, 4, 4)), network.add(engine.Relu(), y))
    x = network.add(engine.Conv(normal(1, 1, 4, 4)), x)
    y = network.add(engine.Relu(), network.add(engine.Add(), y, x))
    return network.add(engine.Conv(normal(3, 3, 4, 4)), y)


def shrunken(factor):
    """A channel that batch norm and weight decay have shrunk."""

    def make(network, x):
        kernel = normal(6, 8)
        kernel[:, 2] *= factor
        x = network.add(engine.Linear(kernel, np.ones(8)), x)
        x = network.add(engine.Relu(), x)
        return network.add(engine.Linear(normal(8, 3), normal(3)), x)

    return make


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (dead, (6,)),
        (dead_branch, (6, 6, 4)),
        *((shrunken(factor), (6,)) for factor in (1e-5, 1e-6, 1e-20)),
    ],
)
def test_what_hardly_counts_changes_nothing(make, shape, int8):
    compare(make, shape, int8, 0.05 if int8 else 1e-5)


def mean_of_shares(network, x):
    x = network.add(engine.Conv(normal(3, 3, 4, 8)), x)
    return network.add(engine.Mean(), network.add(engine.Softmax(), x))


def padded_shares(network, x):
    return network.add(
        engine.Conv(normal(3, 3, 4, 4)), network.add(engine.Softmax(), x)
    )


def many(network, x):
    """Weights of one sign: with 8 bits their products would exceed 32."""
    kernel = np.random.default_rng(0).uniform(0.5, 1, (90_000, 2))
    return network.add(engine.Linear(kernel, np.ones(2)), x)


def test_a_layer_may_have_more_inputs_than_32_bits_hold_products():
    compare(many, (90_000,), True, 0.05)


def test_a_pool_beside_faint_weights_has_the_range_of_its_input():
    """What it selects is near zero; the bytes still reach down to -1000."""
    network = engine.GraphBuilder()
    x = network.add(engine.Input((6, 6, 4)))
    x = network.add(engine.Conv(np.eye(4)[None, None]), x)
    y = network.add(engine.Conv(1e-9 * normal(1, 1, 4, 4)), x)
    x = network.add(engine.MaxPool(3, 1, "SAME"), x)
    x = network.add(engine.Add(), y, x)
    x = network.add(engine.Conv(normal(1, 1, 4, 4)), x)
    images = np.full((2, 6, 6, 4), -1000, np.float32)
    images[:, ::2, ::2] = 0
    graph = network.build(x)
    expected = engine.interpret(graph, images)[x]
    found = engine.compile(graph, calibration=[images])(images)
    assert np.abs(found - expected).max() <= 1e-3  # a byte of the pool is 3.9


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("make", [mean_of_shares, padded_shares])
def test_softmax_in_an_image_is_zero_beside_it(make, int8):
    compare(make, (5, 7, 4), int8, 0.05 if int8 else 1e-5)


def test_an_input_may_be_an_output_although_only_its_phases_are_read():
    network = engine.GraphBuilder()
    x = network.add(engine.Input((6, 6, 3)), name="x")
    y = network.add(engine.Conv(normal(2, 2, 3, 4), strides=2), x)
    run = engine.compile(network.build(y, x))
    images = normal(2, 6, 6, 3)
    np.testing.assert_array_equal(run(images)[1], images)


def test_squares_are_read_off_inputs_only():
    network = engine.GraphBuilder()
    x = network.add(
        engine.Conv(normal(1, 1, 3, 4)), network.add(engine.Input((4, 4, 3)))
    )
    x = network.add(engine.SpaceToDepth(2), x, name="squares")
    with pytest.raises(ValueError, match=r"'squares' .* input of the graph only, got"):
        network.build(x)


def test_calls_without_examples_or_repeats_are_refused():
    run, x = compare(shrunken(1), (6,), False, 1e-5)
    assert run(x[:0]).shape == (0, 3)
    for call in (run.tensors, run.profile, run.tune):
        with pytest.raises(ValueError, match="inputs must hold at least one example"):
            call(x[:0])
    for call in (run.profile, run.tune):
        with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
            call(x, repeats=0)


@pytest.mark.parametrize("kind", [engine.MaxPool, engine.AvgPool])
def test_windows_that_would_fill_the_memory_are_refused(kind):
    """As files could ask for: a kilobyte, of a terabyte."""
    network = engine.GraphBuilder()
    x = network.add(engine.Input((1, 1, 1)))
    graph = network.build(network.add(kind(512, 1, 511), x, name="pool"))
    with pytest.raises(ValueError, match=r"window \(512, 512\) is too large for"):
        engine.compile(graph)(np.ones((1, 1, 1, 1), np.float32))


def test_plans_share_the_weights():
    run, _ = compare(shrunken(1), (6,), True, 0.05)
    weights = run.model.graph["linear3"].operation.weights
    first, second = (weights.terms(run.target) for _ in range(2))
    assert first is second


def pooled(rng):
    network = engine.GraphBuilder()
    x = network.add(engine.Input((6, 6, 2)))
    x = network.add(engine.Conv(normal(3, 3, 2, 4)), x)
    x = network.add(engine.MaxPool(2), network.add(engine.Relu(), x))
    x = network.add(engine.Linear(normal(4, 3)), network.add(engine.Mean(), x))
    x = network.add(engine.Softmax(), x)
    return network.build(x), (normal(2, 6, 6, 2),)


@pytest.mark.parametrize("make", [pooled, pointwise], ids=lambda f: f.__name__)
def test_what_is_not_a_number_stays_so_in_float32(make):
    """Unless only pruned weights would multiply it, as none does here."""
    graph, (x, *others) = make(np.random.default_rng(0))
    x[0].flat[3] = np.nan
    expected = engine.interpret(graph, x, *others)
    found = engine.compile(graph).tensors(x, *others)
    assert np.isnan(expected[graph.outputs[0]]).any()
    for name, values in found.items():
        np.testing.assert_array_equal(
            np.isnan(values), np.isnan(expected[name]), err_msg=name
        )
