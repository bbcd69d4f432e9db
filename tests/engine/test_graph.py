"""A graph says early, and by name, what does not fit."""

import numpy as np
import pytest
from engine.networks import convolutional, pointwise, transformer

from cram_jax import engine
from cram_jax.engine import GraphBuilder, Input


def ones(*shape):
    return np.ones(shape, np.float32)


def apply(operation, *shapes, dtype="float32"):
    """The type of an operation's result on inputs of these shapes."""
    network = GraphBuilder()
    inputs = [network.add(Input(shape, dtype)) for shape in shapes]
    name = network.add(operation, *inputs, name="here")
    return network.build(name).types[name].shape


@pytest.mark.parametrize(
    ("operation", "shapes", "expected"),
    [
        (engine.Linear(ones(3, 4)), [(3,)], (4,)),
        (engine.Linear(ones(3, 4)), [(None, 3)], (None, 4)),
        (engine.Linear(ones(3, 4)), [(5, 6, 3)], (5, 6, 4)),
        (engine.Conv(ones(3, 3, 2, 4), strides=2), [(5, 6, 2)], (3, 3, 4)),
        (engine.Conv(ones(3, 1, 2, 4), padding="VALID"), [(5, 6, 2)], (3, 6, 4)),
        (engine.Conv(ones(3, 3, 2, 4), padding=2), [(5, 6, 2)], (7, 8, 4)),
        (engine.MaxPool(3, 2, 1), [(8, 7, 2)], (4, 4, 2)),
        (engine.AvgPool((2, 1), (2, 1)), [(8, 7, 2)], (4, 7, 2)),
        (engine.Mean(), [(8, 7, 2)], (2,)),
        (engine.Flatten(), [(8, 7, 2)], (112,)),
        (engine.SpaceToDepth(2), [(8, 6, 3)], (4, 3, 12)),
        (engine.Token(3), [(None, 5)], (5,)),
        (engine.Add(), [(4,), (4,)], (4,)),
        (engine.Attention(2), [(None, 6)] * 3, (None, 6)),
    ],
)
def test_shapes_are_inferred(operation, shapes, expected):
    assert apply(operation, *shapes) == expected


@pytest.mark.parametrize(
    ("operation", "shapes", "message"),
    [
        (engine.Linear(ones(3, 4)), [(5,)], "kernel's inputs of 3 does not fit"),
        (engine.Conv(ones(3, 3, 2, 4)), [(5, 6, 3)], "kernel's inputs of 2 does not"),
        (engine.Conv(ones(3, 3, 2, 4)), [(5,)], "needs rank 3, got shape"),
        (engine.Conv(ones(3, 3, 1, 4)), [(8, 8, 4)], "needs zeros between the groups"),
        (engine.Conv(ones(7, 7, 2, 4), padding=0), [(5, 5, 2)], "does not fit into"),
        (engine.MaxPool(2, 1, 2), [(5, 5, 2)], "reaches the window"),
        (
            engine.AvgPool((513, 512), 1, 511),
            [(5, 5, 2)],
            r"window \(513, 512\) must have at most 262144 positions",
        ),
        (engine.Conv(ones(3, 3, 2, 4), padding=3), [(5, 5, 2)], "reaches the window"),
        (engine.Add(), [(4,), (5,)], r"shapes differ: \(4,\) and \(5,\)"),
        (engine.Add(), [(4,)], "needs 2 inputs, got 1"),
        (engine.Attention(4), [(None, 6)] * 3, "heads=4 does not divide 6"),
        (engine.LayerNorm(ones(3), ones(3)), [(4,)], "scale of 3 does not fit"),
        (engine.SpaceToDepth(3), [(8, 6, 3)], "size=3 does not divide 8 x 6"),
        (engine.Embedding(ones(3, 4)), [(3,)], "needs integers"),
        (engine.AddPositions(ones(3, 4)), [(9, 4)], "length 9 is above the table's 3"),
    ],
)
def test_what_does_not_fit_is_named(operation, shapes, message):
    with pytest.raises(ValueError, match=f"node 'here' .*: .*{message}"):
        apply(operation, *shapes)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: engine.Linear(ones(3)), ValueError, "kernel must have shape"),
        (lambda: engine.Linear(ones(0, 3)), ValueError, "kernel must have shape"),
        (
            lambda: engine.Linear(ones(3, 4), ones(3)),
            ValueError,
            r"bias must have shape \(4,\), got \(3,\)",
        ),
        (lambda: engine.Linear(ones(2, 2) / 0), ValueError, "kernel must be finite"),
        (lambda: engine.Linear([["a"]]), TypeError, "kernel must be an array of num"),
        (lambda: engine.Attention(0), ValueError, "heads must be at least 1, got 0"),
        (lambda: engine.Token(-1), ValueError, "index must be at least 0, got -1"),
        (lambda: engine.MaxPool(0), ValueError, "window must be between 1"),
        (lambda: engine.MaxPool((1, 2, 3)), ValueError, "window must be a number or"),
        (lambda: engine.MaxPool(2, 2, "FULL"), ValueError, "padding must be 'SAME'"),
        (lambda: engine.MaxPool(2, 2, [[1, 2]]), ValueError, "padding must be"),
        (lambda: Input((3,), "int8"), ValueError, "dtype must be 'float32' or"),
        (lambda: Input((3, 3), "int32"), ValueError, "shape of a int32 input must"),
        (lambda: Input((None,)), TypeError, r"shape\[0\] must be an integer"),
        (lambda: Input(64), TypeError, "shape must be a tuple of sizes, got 64"),
        (
            lambda: engine.Conv(ones(3, 3, 2, 4), padding=(1, 1)),
            ValueError,
            r"padding must be a number, \(\(top, bottom\), .* got \(1, 1\)",
        ),
        (
            lambda: engine.Conv(ones(3, 3, 2, 4), strides=2.0),
            TypeError,
            "strides must be an integer, got 2.0",
        ),
        (
            lambda: engine.MaxPool(None),
            TypeError,
            "window must be an integer, got None",
        ),
        (
            lambda: engine.batch_norm(ones(2), -ones(2)),
            ValueError,
            "variance must be at least 0, got -1.0",
        ),
        (
            lambda: GraphBuilder().add(engine.Relu),
            TypeError,
            "operation must be an operation, got <class",
        ),
        (
            lambda: engine.LayerNorm(ones(2), ones(2), 0.0),
            ValueError,
            r"epsilon must be in \(0, 1\), got 0.0",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_wrong_options_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_name_by_default_is_not_one_that_was_given():
    network = GraphBuilder()
    x = network.add(Input((3,)), name="relu1")
    y = network.add(engine.Relu(), x)
    z = network.add(engine.Relu(), y)
    assert len({x, y, z}) == 3
    network.build(z)


def test_a_graph_is_in_order_and_has_unique_names():
    network = GraphBuilder()
    x = network.add(Input((3,)), name="x")
    network.add(engine.Relu(), x, name="y")
    with pytest.raises(ValueError, match="output 'z' is not a node"):
        network.build("z")
    with pytest.raises(ValueError, match="a graph needs an output"):
        network.build()
    network.add(engine.Relu(), "later", name="z")
    with pytest.raises(ValueError, match="node 'z' reads 'later', which is not before"):
        network.build("z")
    listed = GraphBuilder()
    x = listed.add(Input((3,)), name="x")
    with pytest.raises(ValueError, match=r"output \['x'\] is not a node"):
        listed.build([x])
    listed.add(engine.Add(), [x, x], name="y")
    with pytest.raises(ValueError, match=r"node 'y' reads \['x', 'x'\], which is not"):
        listed.build("y")
    twice = GraphBuilder()
    twice.add(Input((3,)), name="x")
    twice.add(Input((3,)), name="x")
    with pytest.raises(ValueError, match="two nodes are called 'x'"):
        twice.build("x")
    numbered = GraphBuilder()
    numbered.add(Input((3,)), name=1)
    with pytest.raises(ValueError, match="names of nodes must be texts, got 1"):
        numbered.build(1)
    lengths = GraphBuilder()
    lengths.add(Input((4, 2)), name="x")
    lengths.add(Input((None,), "int32"), name="y")
    with pytest.raises(ValueError, match="inputs must share one length"):
        lengths.build("x")
    ints = GraphBuilder()
    ints.add(Input((None,), "int32"), name="x")
    with pytest.raises(ValueError, match="output 'x' is not float32"):
        ints.build("x")


@pytest.mark.parametrize("make", [convolutional, transformer, pointwise])
def test_the_reference_computes_in_the_dtype_asked_for(make):
    graph, inputs = make(np.random.default_rng(0))
    dtypes = {
        name: values.dtype
        for name, values in engine.interpret(graph, *inputs, dtype=np.float32).items()
        if graph.types[name].dtype == "float32"
    }
    assert dtypes == dict.fromkeys(dtypes, np.float32)
