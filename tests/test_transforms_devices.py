"""The transformations where each device has a part of the batch."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from small_problem import (
    assert_close,
    loss_fn,
    make_batch,
    make_params,
    run_once,
)

from cram_jax import (
    compressed_sam,
    cram,
    cram_plus,
    identity,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def on_eight_devices(step, check_vma=True):
    """A step of (grads, params, batch), each device with a part of the batch."""
    return jax.jit(
        jax.shard_map(
            step,
            mesh=jax.make_mesh(
                (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
            ),
            in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )
    )


@pytest.mark.several_devices
@pytest.mark.parametrize(
    ("make", "check_vma", "has_aux"),
    [
        (cram, True, True),
        (cram, False, False),
        (cram_plus, True, False),
        (cram_plus, False, True),
    ],
)
def test_shard_map_averages_over_the_axis(make, check_vma, has_aux):
    def loss(params, batch):
        value = loss_fn(params, batch)
        return (value, batch[0]) if has_aux else value

    params, batch = make_params(), make_batch(size=16)
    grads = jax.grad(loss_fn)(params, batch)
    expected = run_once(
        make(loss, top_k(0.5), 0.1, has_aux=has_aux), grads, params, batch
    )
    transformation = make(loss, top_k(0.5), 0.1, has_aux=has_aux, axis_name="data")
    step = on_eight_devices(
        functools.partial(run_once, transformation), check_vma=check_vma
    )
    assert_close(step(grads, params, batch), expected)


def copied(leaf):
    return jax.lax.pcast(leaf, "data", to="varying")


def gathered(leaf):
    """As in FSDP: each device has a part, and collects the others."""
    part = leaf.shape[0] // 8
    mine = jax.lax.dynamic_slice_in_dim(leaf, jax.lax.axis_index("data") * part, part)
    return jax.lax.all_gather(mine, "data", tiled=True)


@pytest.mark.several_devices
@pytest.mark.parametrize("make", [cram, cram_plus, compressed_sam])
@pytest.mark.parametrize(
    ("first", "last", "is_averaged"),
    [
        (copied, copied, False),
        (copied, lambda leaf: leaf, True),
        (lambda leaf: leaf, gathered, False),
    ],
    ids=["copied", "mixed_averaged_loss", "mixed_gathered"],
)
def test_shard_map_averages_where_parameters_count_as_varying(
    make, first, last, is_averaged
):
    params, batch = make_params(), make_batch(size=16)
    grads = jax.grad(loss_fn)(params, batch)
    expected = run_once(make(loss_fn, top_k(0.5), 0.1), grads, params, batch)

    def loss(params, batch):
        value = loss_fn(params, batch)
        return jax.lax.pmean(value, "data") if is_averaged else value

    rule = make(loss, top_k(0.5), 0.1, axis_name="data")

    @on_eight_devices
    def step(grads, params, batch):
        params["first"] = jax.tree.map(first, params["first"])
        params["last"]["kernel"] = last(params["last"]["kernel"])
        # The masks count as varying too; all devices agree on them.
        return jax.lax.pmean(run_once(rule, grads, params, batch), "data")

    assert_close(step(grads, params, batch), expected)


@pytest.mark.several_devices
def test_pmap_averages_over_the_axis():
    params, batch = make_params(), make_batch(size=16)
    grads = jax.grad(loss_fn)(params, batch)
    expected = run_once(cram_plus(loss_fn, top_k(0.5), 0.1), grads, params, batch)
    transformation = cram_plus(loss_fn, top_k(0.5), 0.1, axis_name="data")
    step = jax.pmap(
        functools.partial(run_once, transformation),
        axis_name="data",
        in_axes=(None, None, 0),
    )
    shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    outcome = step(grads, params, shards)
    for device in range(8):
        ours = jax.tree.map(lambda x, d=device: x[d], outcome)
        assert_close(ours, expected)


@pytest.mark.parametrize("make", [cram, cram_plus, compressed_sam])
def test_a_forgotten_axis_name_is_an_error_where_jax_knows_what_varies(make):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, same = PartitionSpec("data"), PartitionSpec()

    def trace(loss, params_spec, **options):
        rule = make(loss, identity(), 0.1, **options)
        step = jax.shard_map(
            lambda params, batch: run_once(rule, params, params, batch)[0],
            mesh=mesh,
            in_specs=(params_spec, spread),
            out_specs=params_spec,
        )
        return jax.eval_shape(step, jnp.ones((4, 2)), jnp.ones((4, 2)))

    def loss(params, batch):
        return jnp.mean(params * batch)

    def averaged(params, batch):
        return jax.lax.pmean(loss(params, batch), "data")

    with pytest.raises(ValueError, match="axis_name must name .* got None: .* 'data'"):
        trace(loss, same)
    trace(loss, same, axis_name="data")
    trace(averaged, same)
    # Every device trains a model of its own: there is nothing to average.
    trace(loss, spread)
