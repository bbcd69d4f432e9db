"""Losses on a part of the batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cram_jax import cram, cram_plus, identity, loss_scaled, subsampled, top_k


def loss_fn(params, x, y, scale=1.0):
    return scale * jnp.mean((x["inputs"] @ params - y) ** 2)


def make_inputs(size=16):
    key = jax.random.key(0)
    x = {"inputs": jax.random.normal(key, (size, 3))}
    return {"x": x, "y": jnp.arange(float(size))[:, None]}


@pytest.mark.parametrize("every", [1, 2, 3, 4, 16, 20])
def test_every_nth_example_is_used(every):
    inputs = make_inputs()
    params = jnp.ones((3, 1))
    loss = subsampled(loss_fn, "x", "y", every=every)(params, **inputs, scale=2.0)
    expected = loss_fn(
        params,
        {"inputs": inputs["x"]["inputs"][::every]},
        inputs["y"][::every],
        scale=2.0,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_arguments_may_be_passed_by_position():
    inputs, params = make_inputs(), jnp.ones((3, 1))
    loss = subsampled(loss_fn, "x", "y", every=4)
    expected = loss(params, **inputs, scale=2.0)
    assert loss(params, inputs["x"], inputs["y"], 2.0) == expected
    assert loss(params, inputs["x"], y=inputs["y"], scale=2.0) == expected


def test_arguments_that_are_not_named_stay_whole():
    seen = {}

    def loss_fn(params, batch, table):
        seen.update(batch=batch.shape, table=table.shape)
        return jnp.sum(params)

    loss = subsampled(loss_fn, "batch", every=4)
    loss(jnp.ones(1), batch=jnp.ones((8, 2)), table=jnp.ones((8, 2)))
    assert seen == {"batch": (2, 2), "table": (8, 2)}


def test_the_compressed_gradient_comes_from_the_part_the_dense_one_from_all():
    params, inputs = jnp.array([[1.0], [-2.0], [3.0]]), make_inputs()
    grads = jax.grad(loss_fn)(params, **inputs)
    rule = cram_plus(subsampled(loss_fn, "x", "y", every=4), top_k(0.5), 0.1)
    updates, state = rule.update(grads, rule.init(params), params, **inputs)

    perturbed = params + 0.1 * grads
    smallest = jnp.argmin(jnp.abs(perturbed))
    compressed = perturbed.at[smallest].set(0)
    part = jax.tree.map(lambda a: a[::4], inputs)
    loss, inner = jax.value_and_grad(loss_fn)(compressed, **part)
    np.testing.assert_allclose(updates, grads + inner.at[smallest].set(0), rtol=1e-6)
    np.testing.assert_allclose(state.compressed_loss, loss, rtol=1e-6)


@pytest.mark.several_devices
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_each_device_takes_its_own_examples_and_exchanges_only_gradients(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    params, inputs = jnp.ones((3, 1)), make_inputs(64)
    rule = cram_plus(subsampled(loss_fn, "x", "y", every=4), top_k(0.5), 0.1)

    def step(params, inputs):
        grads = jax.grad(loss_fn)(params, **inputs)
        return rule.update(grads, rule.init(params), params, **inputs)[0]

    expected = jax.jit(step)(params, inputs)
    with jax.set_mesh(mesh):
        spread = jax.device_put(inputs, NamedSharding(mesh, P("data")))
        whole = jax.device_put(params, NamedSharding(mesh, P()))
        compiled = jax.jit(step).lower(whole, spread).compile()
        np.testing.assert_allclose(compiled(whole, spread), expected, rtol=1e-5)
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert not re.search(rf"= \S+ {collective}", compiled.as_text())
    assert "all-reduce" in compiled.as_text()


@pytest.mark.several_devices
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_part_may_not_divide_the_batch_of_a_device(axis_type):
    inputs, loss = make_inputs(16), subsampled(loss_fn, "x", "y", every=3)
    params = jnp.ones((3, 1))
    expected = loss(params, **inputs)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        spread = jax.device_put(inputs, NamedSharding(mesh, P("data")))
        whole = jax.device_put(params, NamedSharding(mesh, P()))
        np.testing.assert_allclose(jax.jit(loss)(whole, **spread), expected, rtol=1e-6)


def test_a_training_run_on_a_part_learns():
    inputs = make_inputs(32)
    truth = jnp.array([[1.0], [0.0], [2.0]])
    inputs["y"] = inputs["x"]["inputs"] @ truth
    optimizer = optax.chain(
        cram_plus(subsampled(loss_fn, "x", "y", every=4), top_k(1 / 3), 0.01),
        optax.sgd(0.1),
    )
    params = jnp.zeros((3, 1))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(60):
        grads = jax.grad(loss_fn)(params, **inputs)
        updates, state = update(grads, state, params, **inputs)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, truth, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "every", "error", "match"),
    [
        ((), 2, ValueError, "must be named, got none"),
        (("z",), 2, TypeError, r"no argument 'z' to subsample, it has \['x', 'y', "),
        (("params",), 2, TypeError, "no argument 'params'"),
        (("x",), 0, ValueError, "every must be at least 1, got 0"),
        (("x",), 2.0, TypeError, "every must be an integer, got 2.0"),
        (("x",), True, TypeError, "every must be an integer, got True"),
    ],
)
def test_wrong_arguments_are_refused(arguments, every, error, match):
    with pytest.raises(error, match=match):
        subsampled(loss_fn, *arguments, every=every)


def test_a_loss_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="loss_fn must be a function, got 3"):
        subsampled(3, "x", every=2)


def test_a_loss_that_takes_any_argument_can_be_subsampled_by_any_name():
    def loss_fn(params, **inputs):
        return jnp.sum(params) * jnp.size(inputs["batch"])

    loss = subsampled(loss_fn, "batch", every=2)
    assert loss(jnp.ones(1), batch=jnp.ones(6)) == 3
    with pytest.raises(TypeError, match="no argument 'params' to subsample"):
        subsampled(loss_fn, "params", every=2)


def test_a_scalar_has_no_examples():
    with pytest.raises(ValueError, match="x/inputs must have the examples along axis"):
        subsampled(loss_fn, "x", every=2)(jnp.ones(1), x={"inputs": 1.0}, y=0)


def narrow_loss(params, x, y):
    """Its gradient with respect to the outputs is too small for float16."""
    x, y = x.astype(jnp.float16), y.astype(jnp.float16)
    outputs = x @ params.astype(jnp.float16)
    return 2e-8 * jnp.mean((outputs - y).astype(jnp.float32) ** 2)


def narrow_inputs():
    rng = np.random.default_rng(0)
    params = rng.normal(size=(3, 1)).astype(np.float32)
    return params, {"x": rng.normal(size=(8, 3)), "y": rng.normal(size=(8, 1))}


@pytest.mark.parametrize("scale", [65536.0, np.float32(30000), jnp.float32(65536.0)])
def test_a_scaled_loss_has_the_gradient_that_underflows_otherwise(scale):
    params, inputs = narrow_inputs()
    x, y = inputs["x"], inputs["y"]
    expected = 2e-8 * 2 / 8 * x.T @ (x @ params - y)
    rule = cram(loss_scaled(narrow_loss, scale), identity(), 0.0)
    updates, state = rule.update(params, rule.init(params), params, **inputs)
    assert jnp.all(jax.grad(narrow_loss)(params, **inputs) == 0)
    # float16 has eleven bits, and the sums cancel.
    np.testing.assert_allclose(updates, expected, rtol=0.02)
    np.testing.assert_allclose(state.compressed_loss, narrow_loss(params, **inputs))


def test_a_scaled_loss_keeps_values_auxiliary_data_and_arguments():
    def loss_fn(params, x, *, offset):
        return jnp.sum(params * x) + offset, {"x": x, "count": 3}

    loss = loss_scaled(loss_fn, 8.0)
    params, x = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.25])
    value, aux = loss(params, x, offset=1.0)
    assert (value, aux["count"]) == (2.0, 3)
    grads, _ = jax.jit(jax.grad(loss, has_aux=True))(params, x, offset=1.0)
    np.testing.assert_array_equal(grads, x)
    _, tangent = jax.jvp(lambda p: loss(p, x, offset=1.0)[0], (params,), (x,))
    assert tangent == 0.5**2 + 0.25**2


def test_a_scaled_loss_of_narrow_parameters_needs_no_implicit_promotion():
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    loss = loss_scaled(lambda params: jnp.sum(params**2), 8.0)
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(jax.grad(loss)(params), 2 * params)


@pytest.mark.parametrize("scale", ["1", True, None, np.ones(2)])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(TypeError, match="scale must be a number, got"):
        loss_scaled(loss_fn, scale)
    with pytest.raises(TypeError, match="loss_fn must be a function, got 3"):
        loss_scaled(3, 1.0)


@pytest.mark.parametrize("scale", [0, -1.0, np.inf, jnp.nan])
def test_a_scale_that_loses_the_gradient_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be finite and above 0, got"):
        loss_scaled(loss_fn, scale)
