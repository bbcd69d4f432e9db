"""Recalibrated statistics against float64 means over the batches.

The relative tolerance of float32 is 2^-24 / (1 - momentum) for the rounding of the
momentum, and the same again for that of 1 - momentum, beside some units of the batch
statistic itself.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from averages import (
    BATCHES,
    float64_statistics,
    moving_average,
    tolerance,
)
from hypothesis import given
from hypothesis import strategies as st

from cram_jax import recalibrate

pytestmark = pytest.mark.usefixtures("quick_compilation")


def mean_and_variance(batch):
    return {"mean": batch.mean(0), "var": batch.var(0)}


@jax.jit
def pass_of(momentum, stats, batch):
    return moving_average(stats, mean_and_variance(batch), momentum)


@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999]),
    spread=st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e4, 1e5, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 30.0]),
    old=st.sampled_from([0.0, 1.0, 1e9]),
)
def test_any_spread_and_momentum_gives_the_mean_over_batches(
    momentum, spread, offset, old
):
    batches = [np.float32(spread) * (x + np.float32(offset)) for x in BATCHES]
    stats = {"mean": jnp.full(5, old), "var": jnp.full(5, old)}
    found = recalibrate(partial(pass_of, np.float32(momentum)), stats, batches)
    mean, variance = float64_statistics(batches)
    # The means of single batches are rounded relative to their entries.
    rounding = 1e-6 * spread * (offset + 3)
    np.testing.assert_allclose(
        found["mean"], mean, rtol=tolerance(momentum), atol=rounding
    )
    np.testing.assert_allclose(found["var"], variance, rtol=tolerance(momentum) + 1e-5)


def test_what_settles_without_being_an_average_keeps_what_it_settles_at():
    """The power iteration of a spectral norm, which from 0 would stay at 0."""

    def apply(stats, batch):
        vector = jnp.array([[2.0, 0.0], [0.0, 0.1]]) @ stats["vector"]
        return {
            "mean": 0.9 * stats["mean"] + 0.1 * batch.mean(0),
            "vector": vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12),
        }

    stats = {"mean": jnp.ones(5), "vector": jnp.array([1.0, 1e-3])}
    found = recalibrate(apply, stats, BATCHES)
    np.testing.assert_allclose(found["vector"], [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(
        found["mean"], float64_statistics(BATCHES)[0], rtol=tolerance(0.9)
    )


def test_float64_statistics_are_exact():
    with jax.enable_x64(True):
        old = {"mean": jnp.full(5, 7.0), "var": jnp.full(5, 9.0)}
        batches = [jnp.asarray(x, jnp.float64) for x in BATCHES]
        stats = recalibrate(partial(pass_of, 0.999), old, batches)
        mean, variance = float64_statistics(batches)
        np.testing.assert_allclose(stats["mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(stats["var"], variance, rtol=1e-12)


def test_narrow_statistics_need_no_implicit_promotion():
    def apply(stats, batch):
        return {"mean": 0.75 * stats["mean"] + 0.25 * batch.mean()}

    old = {"mean": jnp.zeros([], jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"):
        new = recalibrate(apply, old, [jnp.array([1.0, 3.0]), jnp.array([4.0, 8.0])])
    assert (new["mean"], new["mean"].dtype) == (4, jnp.bfloat16)


def test_many_batches_are_summed_without_losing_digits():
    """A sum of these in float32 would lose all but the first."""
    batches = [np.full(1, 1.0 if i else 2.0**24, np.float32) for i in range(200)]

    def apply(stats, batch):
        return {"mean": 0.5 * stats["mean"] + 0.5 * batch}

    stats = recalibrate(apply, {"mean": np.zeros(1, np.float32)}, batches)
    np.testing.assert_allclose(stats["mean"], np.mean(batches, dtype=np.float64))


@pytest.mark.parametrize("norms", [1, 2, 3])
@pytest.mark.parametrize("uses_running", [False, True])
def test_it_takes_as_many_passes_as_it_says(norms, uses_running):
    passes = []

    def apply(stats, batch):
        passes.append(batch)
        new, x = {}, batch
        for name, old in stats.items():
            own = {"mean": x.mean(0)}
            new[name] = moving_average(old, own, 0.5)
            x = jnp.tanh(x - (old if uses_running else own)["mean"])
        return new

    stats = {f"norm{i}": {"mean": jnp.zeros(5)} for i in range(norms)}
    recalibrate(apply, stats, BATCHES)
    each = norms + 1 if uses_running and norms > 1 else 1
    assert len(passes) == 6 + each * len(BATCHES)


def test_what_is_no_statistic_keeps_its_value():
    def apply(stats, batch):
        return stats | {
            "mean": 0.5 * stats["mean"] + 0.5 * batch,
            "images": stats["images"] + 2,
            "first": jnp.array(False),
        }

    stats = {
        "mean": jnp.zeros(1),
        "images": jnp.array(7),
        "first": jnp.array(True),
        "key": jax.random.key(3),
        "count": np.array(8),
    }
    found = recalibrate(apply, stats, [jnp.ones(1)])
    np.testing.assert_array_equal(found["mean"], [1.0])
    for name in ("images", "first", "key", "count"):
        assert found[name] == stats[name]


@pytest.mark.parametrize("dtype", ["int32", "float32"])
@pytest.mark.parametrize(("count", "expected"), [(3, 23), (40, 40)])
def test_a_counter_is_raised_to_where_a_bias_correction_ends(dtype, count, expected):
    """0.5^23 is the resolution of float32."""

    def apply(stats, batch):
        count = stats["count"] + 1
        hidden = 0.5 * stats["hidden"] + 0.5 * batch
        return {
            "count": count,
            "hidden": hidden,
            "average": hidden / (1 - 0.5 ** count.astype(jnp.float32)),
        }

    stats = {
        "count": jnp.array(count, dtype),
        "hidden": jnp.ones(1),
        "average": jnp.ones(1),
    }
    found = recalibrate(apply, stats, [jnp.ones(1), jnp.full(1, 5.0)])
    assert found["count"] == expected
    assert found["count"].dtype == dtype
    for name in ("hidden", "average"):
        np.testing.assert_allclose(found[name], [3.0], rtol=1e-6)


@pytest.mark.several_devices
def test_statistics_stay_where_they_are():
    mesh = jax.make_mesh((8,), ("d",))
    sharding = jax.NamedSharding(mesh, jax.P("d"))
    stats = {"mean": jax.device_put(jnp.zeros(8), sharding)}
    batches = [np.arange(16.0, dtype=np.float32).reshape(2, 8)]
    apply = jax.jit(lambda s, b: moving_average(s, {"mean": b.mean(0)}, 0.9))
    found = recalibrate(apply, stats, batches)
    assert found["mean"].sharding == sharding
    np.testing.assert_allclose(found["mean"], batches[0].mean(0), rtol=tolerance(0.9))
