"""What second-order pruning refuses, and what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax import compress, cram, second_order


def prune_at_once(loss_fn, params, examples, sparsity, **options):
    return compress(params, second_order(sparsity, loss_fn, examples, **options))


def linear(params, x):
    return jnp.vdot(params["w"], x["w"].mean(0))


PARAMS = {"w": jnp.ones((2, 3))}
EXAMPLES = {"x": {"w": jnp.ones((6, 2, 3))}}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be at least 0 and below 1"),
        ({"sparsity": "0.5"}, TypeError, "sparsity must be a number .* got '0.5'"),
        ({"scope": "model"}, ValueError, "scope must be 'global' or 'layer', got 'mo"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 5.0}, TypeError, "block_size must be an integer, got 5.0"),
        ({"recomputations": 0}, ValueError, "recomputations must be at least 1, got 0"),
        ({"recomputations": True}, TypeError, "recomputations must be an int.* True"),
        ({"micro_batch": -1}, ValueError, "micro_batch must be at least 1, got -1"),
        ({"examples_per_gradient": 4}, ValueError, "must divide .* 6, got 4"),
        ({"damping": 0.0}, ValueError, "damping must be finite and above 0, got 0.0"),
        ({"damping": np.nan}, ValueError, "damping must be finite and above 0, got na"),
        ({"damping": None}, TypeError, "damping must be a number above 0, got None"),
        ({"examples": [1]}, TypeError, "examples must map names .* got list"),
        ({"examples": {}}, ValueError, "at least one example, got {}"),
        (
            {"examples": {"x": {"w": jnp.ones((0, 2, 3))}}},
            ValueError,
            "examples must hold at least one example, got {'x/w': 0}",
        ),
        (
            {"examples": {"x": jnp.ones((2, 3)), "y": jnp.ones(3)}},
            ValueError,
            "examples must all be of one number, got {'x': 2, 'y': 3}",
        ),
        (
            {"examples": EXAMPLES | {"rate": 0.1}},
            ValueError,
            r"examples\['rate'\] must have the examples along axis 0, got a scalar",
        ),
        ({"constants": [1]}, TypeError, "constants must map names .* got list"),
        (
            {"constants": {"x": 1}},
            ValueError,
            r"examples and constants must not both hold \['x'\]",
        ),
        (
            {"examples": {"z": jnp.ones(3)}},
            TypeError,
            r"needs the argument 'x', but examples and constants got \['z'\]; pass it "
            r"by name: examples=\{'x': ...\}",
        ),
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function, got 3"),
        (
            {"loss_fn": lambda params, x: x["w"].sum(0)},
            TypeError,
            r"loss_fn must return a scalar, .* got an array of shape \(2, 3\)",
        ),
        (
            {"loss_fn": lambda params, x: (linear(params, x), 1)},
            TypeError,
            "loss_fn must return a scalar, got a tuple of 2; .* pass has_aux=True",
        ),
        (
            {"has_aux": True},
            TypeError,
            r"loss_fn must return \(loss, auxiliary data\) with has_aux=True",
        ),
        ({"has_aux": "no"}, TypeError, "has_aux must be True or False, got 'no'"),
        ({"where": lambda *_: False}, ValueError, "chooses no leaf to prune"),
        ({"params": {"w": jnp.ones((2, 3), int)}}, TypeError, "has dtype int32"),
        ({"masks": {"v": True}}, ValueError, "masks must have the structure of params"),
        (
            {"masks": {"w": jnp.ones((2, 3))}},
            TypeError,
            r"masks\['w'\] must be bool, got float32",
        ),
        (
            {"masks": {"w": jnp.ones(3, bool)}},
            ValueError,
            r"masks\['w'\] must have the shape of its parameter \(2, 3\), got \(3,\)",
        ),
    ],
)
def test_bad_input_is_refused(options, error, message):
    arguments = {
        "loss_fn": linear, "params": PARAMS, "examples": EXAMPLES, "sparsity": 0.5
    }  # fmt: skip
    with pytest.raises(error, match=message):
        prune_at_once(**(arguments | options))


def examples_with(example, value):
    x = np.ones((6, 2, 3), np.float32)
    x[example, 1, 2] = value
    return {"x": {"w": x}}


# 1e17 is finite, but its square over a damping of 1e-7 is not.
@pytest.mark.parametrize(
    ("value", "group", "named"),
    [
        (np.nan, 1, "example 4"),
        (-np.inf, 2, "examples 4 to 5"),
        (1e17, 1, "example 4"),
    ],
)
def test_a_gradient_that_is_not_finite_names_its_example_and_leaf(value, group, named):
    projector = second_order(
        0.5, linear, examples_with(4, value), examples_per_gradient=group, micro_batch=4
    )
    with pytest.raises(
        ValueError, match=rf"that of {named} .* params\['w'\] is not fi"
    ):
        compress(PARAMS, projector)


def test_a_gradient_of_what_is_pruned_already_need_not_be_finite():
    masks = {"w": jnp.ones((2, 3), bool).at[1, 2].set(False)}
    result = prune_at_once(linear, PARAMS, examples_with(4, np.nan), 0.5, masks=masks)
    assert int(result.masks["w"].sum()) == 3
    assert jnp.isfinite(result.params["w"]).all()


def test_weights_that_are_not_finite_are_named():
    params = {"w": PARAMS["w"].at[0, 1].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"params\['w'\] must be finite"):
        prune_at_once(linear, params, EXAMPLES, 0.5)


def test_weights_that_move_out_of_their_dtype_are_named():
    """Six weights of 60,000 are one of 360,000, beyond float16."""
    params = {"w": jnp.full((2, 3), 6e4, jnp.float16)}

    def loss_fn(params, x):
        return jnp.sum(params["w"].astype("float32") * x["w"].mean(0))

    with pytest.raises(ValueError, match=r"damping must be larger: .* params\['w'\]"):
        prune_at_once(loss_fn, params, EXAMPLES, 0.8, recomputations=1)


@pytest.mark.parametrize("traced", ["params", "examples"])
def test_a_traced_call_is_refused(traced):
    arguments = {"params": PARAMS, "examples": EXAMPLES}

    @jax.jit
    def prune(value):
        return prune_at_once(linear, sparsity=0.5, **(arguments | {traced: value}))

    with pytest.raises(TypeError, match=r"second_order\(0.5, ...\) prunes .* once and"):
        prune(arguments[traced])


def test_training_for_it_is_refused():
    projector = second_order(0.5, linear, EXAMPLES)
    optimizer = cram(linear, projector, rho=0.1)
    state = optimizer.init(PARAMS)
    with pytest.raises(TypeError, match="call compress outside jit, and train for top"):
        jax.jit(optimizer.update)(PARAMS, state, PARAMS, x=EXAMPLES["x"])
