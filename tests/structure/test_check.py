"""Whether a function may be called with the smaller arrays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax.structure import check_apply, small_shapes, trace_structure


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


SHAPES = {"a": array(6, 16), "c": array(16, 3)}
X = array(4, 6)


def between(function):
    return lambda p, x: function(x @ p["a"]) @ p["c"]


WRONG = {
    "the width in a number": (
        lambda h: h / h.shape[-1],
        "it has the number 12.0 where the smaller network has the number 16.0",
    ),
    "a unit by its number": (
        lambda h: h * h[:, 3:4],
        "it has slice of shape (4, 1) where the smaller network has slice",
    ),
    "heads by reshape": (
        lambda h: jax.nn.softmax(h.reshape(4, 4, -1), 2).reshape(4, -1),
        "it has reshape of shape (4, 4, 3) where the smaller network has reshape",
    ),
    "constants": (
        lambda h: h * jnp.arange(h.shape[-1]),
        "it has iota of shape (12,) where the smaller network has",
    ),
    "another program": (
        lambda h: jnp.tanh(h) if h.shape[-1] < 16 else jnp.sin(h),
        "it has tanh of shape (4, 12) where the smaller network has sin",
    ),
    "an error": (lambda h: h + jnp.ones(16), "it raises ValueError"),
    "inside of a loop": (
        lambda h: jax.lax.scan(lambda c, _: (c * c.shape[-1], None), h, None, 2)[0],
        "the number 12.0 where the smaller network has the number 16.0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_be_silently_wrong_is_refused(name):
    function, reason = WRONG[name]
    structure = trace_structure(between(function), SHAPES, X)
    kept = np.arange(structure.size) >= structure.size // 4
    assert reason in check_apply(structure, kept)


def test_the_models_own_function_is_allowed_where_it_is_the_same():
    structure = trace_structure(between(jax.nn.gelu), SHAPES, X)
    kept = np.arange(16) % 3 > 0
    assert check_apply(structure, kept) is None
    assert check_apply(structure, kept, array(9, 6)) is None


def test_a_printed_number_is_no_difference():
    def activation(h):
        jax.debug.print("{}", h.mean())
        return jax.nn.relu(h)

    structure = trace_structure(between(activation), SHAPES, X)
    kept = np.arange(16) % 3 > 0
    assert check_apply(structure, kept) is None


def test_another_number_of_outputs_is_refused():
    structure = trace_structure(between(jnp.tanh), SHAPES, X)
    kept = np.arange(16) > 2
    reason = check_apply(structure, kept, apply=lambda p, x: (x, x))
    assert reason == "it returns 2 arrays, expected 1"


class Mlp(nn.Module):
    """A Linen module that is built with its widths."""

    width: int = 16

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(self.width, name="hidden")(x)))


def test_a_module_with_the_smaller_widths_is_the_smaller_network():
    dense = Mlp()
    variables = jax.eval_shape(dense.init, jax.random.key(0), X)
    structure = trace_structure(dense.apply, variables, X)
    kept = np.arange(16) % 3 > 0
    assert "ScopeParamShapeError" in check_apply(structure, kept)
    (width,) = small_shapes(structure, kept)["params/hidden/bias"]
    assert width == 10
    assert check_apply(structure, kept, apply=Mlp(width).apply) is None
