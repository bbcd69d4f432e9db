"""What a trace finds in small functions, and why it freezes what it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure.comparing import filled, relative_difference, some_kept

from cram_jax.structure import trace_structure


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


SHAPES = {"a": array(6, 16), "c": array(16, 3)}
X = array(4, 6)


def between(function):
    """Two dense layers with something between them."""
    return lambda p, x: function(x @ p["a"]) @ p["c"]


def rms_norm(h):
    return h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1.0)


REMOVABLE = {
    "nothing": (between(lambda h: h), 16),
    "relu": (between(jax.nn.relu), 16),
    "sigmoid, which is not 0 at 0": (between(jax.nn.sigmoid), 16),
    "relu6": (between(jax.nn.relu6), 16),
    "reversal ties the mirrored": (between(lambda h: h + h[:, ::-1]), 8),
    "roll ties every second": (between(lambda h: h + jnp.roll(h, 2, -1)), 2),
    "mean over units": (between(lambda h: h - h.mean(-1, keepdims=True)), 16),
    "rms norm": (between(rms_norm), 16),
    "batch norm in training": (
        between(lambda h: (h - h.mean(0)) / jnp.sqrt(h.var(0) + 0.1)),
        16,
    ),
    "a unit times all others": (between(lambda h: h * h[:, 3:4]), 15),
    "heads by reshape": (
        between(lambda h: jnp.tanh(h.reshape(4, 4, 4)).reshape(4, 16)),
        8,
    ),
    "two splits that nest": (
        between(lambda h: jnp.tanh(h.reshape(4, 2, 8)).reshape(4, 8, 2).reshape(4, 16)),
        8,
    ),
    "half of the units go to the batch": (
        between(
            lambda h: h.reshape(8, 8).sum(0) * jnp.ones((4, 1)) @ jnp.ones((8, 16))
        ),
        2,
    ),
    "zero padding": (
        lambda p, x: jnp.pad(x @ p["a"][:, :8], ((0, 0), (4, 4))) @ p["c"],
        8,
    ),
    "the units meet in a product": (
        lambda p, x: jnp.tanh(x @ p["a"]) @ jnp.tanh(x @ p["a"]).T @ jnp.ones((4, 3)),
        16,
    ),
    "an empty array": (
        between(lambda h: jnp.concatenate([h, h[:, :0].reshape(4, 0)], -1)),
        16,
    ),
    "low rank": (lambda p, x: x @ (p["a"] @ p["c"]), 16),
    "complex numbers": (
        between(lambda h: jnp.real((h + 1j * h) * jnp.exp(1j * jnp.tanh(h)))),
        16,
    ),
}


@pytest.mark.parametrize("name", REMOVABLE)
def test_what_may_go_goes_without_a_difference(name):
    function, groups = REMOVABLE[name]
    structure = trace_structure(function, SHAPES, X)
    assert structure.size == groups
    if name == "complex numbers":
        return
    values = filled((SHAPES, (X,)))
    assert relative_difference(structure, some_kept(structure), *values) < 1e-12


ROWS = np.array([0, 9, 1, 2])


def max_pool(h, padding):
    return jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (4, 1), (1, 1), padding)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: jnp.take(h, ROWS, axis=0),
        lambda h: jnp.take(h, ROWS, axis=0, fill_value=0.0),
        lambda h: jnp.pad(h, ((1, 0), (0, 0)))[1:],
        lambda h: max_pool(h, ((3, 0), (0, 0))),
    ],
    ids=["NaN for all", "filled with 0", "padded with 0", "a maximum with padding"],
)
def test_a_norm_may_follow_what_is_filled_alike(function):
    apply = between(lambda h: rms_norm(function(h)))
    assert trace_structure(apply, SHAPES, X).size == 16


FROZEN = {
    "softmax": (between(jax.nn.softmax), "reduce_max over it"),
    "two-pass layer norm": (
        between(lambda h: h / ((h - h.mean(-1, keepdims=True)) ** 2).mean(-1)[:, None]),
        "a sum over it of values that masks do not make 0",
    ),
    "fft": (between(lambda h: jnp.fft.fft(h).real), "it meets fft, an operation"),
    "cumsum": (between(lambda h: jnp.cumsum(h, -1)), "cumsum along it"),
    "sort": (between(lambda h: jnp.sort(h, -1)), "sort along it"),
    "top_k": (between(lambda h: h - jax.lax.top_k(h, 3)[0][:, -1:]), "top_k"),
    "product of sigmoids": (
        lambda p, x: (
            (jax.nn.sigmoid(x @ p["a"]) @ jax.nn.sigmoid(x @ p["a"]).T)
            @ jnp.ones((4, 3))
        ),
        "a contraction over it of two values",
    ),
    "two splits that do not nest": (
        lambda p, x: (
            jnp.tanh((x @ p["a"][:, :12]).reshape(4, 3, 4)).reshape(4, 4, 3).sum(1)
            @ jnp.ones((3, 3))
        ),
        "a reshape that neither merges nor splits whole axes",
    ),
    "roll by one": (between(lambda h: h + jnp.roll(h, 1, -1)), "indexed by its number"),
    "a lookup": (between(lambda h: h[:, jnp.arange(16) // 2]), "looked up"),
    "a window": (
        between(
            lambda h: jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2), (1, 1), "SAME")
        ),
        "a window moves along it",
    ),
    "rows that are filled with 1": (
        between(lambda h: rms_norm(jnp.take(h, ROWS, axis=0, fill_value=1.0))),
        "a sum over it of values that masks do not make 0",
    ),
    "rows that are filled with the smallest integer": (
        between(lambda h: rms_norm(jnp.take(jnp.int32(h), ROWS, axis=0) * 1.0)),
        "a sum over it of values that masks do not make 0",
    ),
    "rows that are padded with 1": (
        between(
            lambda h: rms_norm(jnp.pad(h, ((1, 0), (0, 0)), constant_values=1.0))[1:]
        ),
        "a sum over it of values that masks do not make 0",
    ),
    "a maximum of padding": (
        between(lambda h: rms_norm(jnp.maximum(max_pool(h, ((4, 0), (0, 0))), -1.0))),
        "a sum over it of values that masks do not make 0",
    ),
    "windows that shift the units": (
        between(lambda h: max_pool(h, ((3, 0), (1, -1)))[:4]),
        "a window moves along it",
    ),
    "returned": (lambda p, x: (x @ p["a"] @ p["c"], x @ p["a"]), "a model output"),
    "never computed": (lambda p, x: jnp.ones((4, 16)) @ p["c"], "nothing computes it"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_has_a_reason(name):
    function, reason = FROZEN[name]
    structure = trace_structure(function, SHAPES, X)
    assert structure.size == 0
    reasons = structure.frozen.get("a[1]") or structure.frozen["c[0]"]
    assert any(reason in why for why in reasons), reasons


def test_it_prints_well():
    def apply(p, x):
        y = (x @ p["qkv"]).reshape(4, 2, 2, 4)
        return (y[:, 0] * y[:, 1]).reshape(4, 8) @ p["out"]

    shapes = {"out": array(8, 3), "qkv": array(6, 16)}
    assert repr(trace_structure(apply, shapes, X)) == (
        "Structure of 2 parameters: 6 groups in 2 families\n"
        "  out  8 input x 3 output\n"
        "  qkv  6 input x 16 output\n"
        "families\n"
        "  0: 2 groups of out[0.0], qkv[1.1]\n"
        "  1: 4 groups of out[0.1], qkv[1.2]\n"
        "frozen, 0 of 16 inner channels\n"
        "  a model output: out[1]\n"
        "  a model input: qkv[0]\n"
        "  a position of the axis is indexed by its number: qkv[1]"
    )


def test_costs_count_parameters_and_multiply_adds():
    from cram_jax.structure.costs import total

    def apply(p, x):
        return jax.lax.scan(
            lambda h, w: (jax.nn.relu(h @ w["up"]) @ w["down"], None), x, p
        )[0]

    shapes = {"up": array(5, 6, 8), "down": array(5, 8, 6)}
    costs = trace_structure(apply, shapes, X).costs
    assert total(costs.parameters, costs.parts) == 2 * 5 * 6 * 8
    assert total(costs.multiply_adds, costs.parts) == 2 * 5 * 4 * 6 * 8
    kept = np.arange(8) < 3
    assert total(costs.multiply_adds, costs.parts, kept) == 2 * 5 * 4 * 6 * 3


def test_carries_are_read_until_nothing_changes():
    """Zeros are lost one carry a turn: sigmoid reaches the last only in the third."""

    def apply(p, x):
        def step(carry, _):
            a, b, _ = carry
            return (jax.nn.sigmoid(a), a, b), None

        start = (x @ p["a"],) * 3
        (_, _, last), _ = jax.lax.scan(step, start, None, length=4)
        return last @ last.T

    structure = trace_structure(apply, {"a": array(6, 16)}, X)
    assert structure.size == 0
    assert "a contraction over it of two values" in structure.frozen["a[1]"][0]


def test_nothing_to_trace_and_foreign_outputs_are_refused():
    with pytest.raises(ValueError, match="variables must have at least one array"):
        trace_structure(lambda v, x: x, {}, X)
    with pytest.raises(ValueError, match="outputs must pick some of what apply"):
        trace_structure(between(jnp.tanh), SHAPES, X, outputs=lambda out: out + 1)
