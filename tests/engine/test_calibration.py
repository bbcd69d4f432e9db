"""Calibration: the ranges of INT8 from examples."""

import numpy as np
import pytest

from cram_jax import engine


def calibrated(batches, method="minmax", **options):
    """The range that is found for the input of a network."""
    network = engine.GraphBuilder()
    graph = network.build(
        network.add(engine.Linear(np.eye(4)), network.add(engine.Input((4,)), name="x"))
    )
    calibration = engine.Calibration(batches, method, **options)
    return engine.compile(graph, calibration=calibration).model.ranges["x"]


def normal(outlier):
    x = np.random.default_rng(0).standard_normal((20000, 4)).astype(np.float32)
    x[0, 0] = outlier
    return x


@pytest.mark.parametrize("outlier", [1e3, 1e9])
def test_calibrations_heed_or_ignore_an_outlier(outlier):
    x = normal(outlier)
    assert outlier < 255 * calibrated([x]).scale < 1.01 * outlier
    # The 0.1 % and 99.9 % quantiles of a normal.
    scale = calibrated([x], "percentile", percentile=99.9).scale
    assert 255 * scale == pytest.approx(2 * 3.09, rel=0.05)


@pytest.mark.parametrize("outlier", [5, 10, 20, 1e3, 1e6])
def test_least_squares_is_the_best_of_many_ranges(outlier):
    """Of those that cut up to four fifths of either end, tried on each value."""
    x = normal(outlier).astype(np.float64)
    shares = np.arange(0.2, 1.0001, 0.05)

    def squared_error(scale, zero):
        integers = np.clip(np.rint(x / scale) + zero, 0, 255)
        return np.sum(((integers - zero) * scale - x) ** 2)

    found = calibrated([x.astype(np.float32)], "least_squares")
    best = min(
        squared_error(scale, np.rint(-x.min() * a / scale))
        for a in shares
        for b in shares
        for scale in [(x.max() * b - x.min() * a) / 255]
    )
    assert squared_error(found.scale, found.zero) <= 1.01 * best


@pytest.mark.parametrize("method", ["minmax", "percentile", "least_squares"])
def test_all_batches_calibrate(method):
    x = normal(8)[:60]
    whole, parts = (calibrated(b, method) for b in ([x], [x[:1], x[1:7], x[7:]]))
    assert (parts.scale, parts.zero) == (whole.scale, whole.zero)
    high, low = ([np.float32([[value, 0, 0, 0]])] for value in (3, -1))
    for batches in (high + low, low + high):
        assert 255 * calibrated(batches).scale == pytest.approx(4)


@pytest.mark.parametrize("method", ["minmax", "percentile", "least_squares"])
@pytest.mark.parametrize("value", [1.0, -3.0, 1e-30, 0.0])
def test_a_tensor_may_be_one_number(method, value):
    found = calibrated([np.full((8, 4), value, np.float32)], method)
    nearest = np.clip(np.rint(value / found.scale) + found.zero, 0, 255)
    assert (nearest - found.zero) * found.scale == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("method", ["minmax", "percentile", "least_squares"])
@pytest.mark.parametrize("size", [1e-42, 3e38])
def test_ranges_reach_to_the_ends_of_float32(method, size):
    x = np.linspace(-size, size, 400, dtype=np.float64).astype(np.float32)
    found = calibrated([x.reshape(100, 4)], method)
    assert found.scale >= 0.9 * 2 * size / 255


def test_calibration_refuses_what_is_not_finite():
    network = engine.GraphBuilder()
    graph = network.build(
        network.add(engine.Linear(np.eye(4)), network.add(engine.Input((4,)), name="x"))
    )
    with pytest.raises(ValueError, match="node 'x' is not finite"):
        engine.compile(graph, calibration=[np.full((1, 4), np.nan, np.float32)])
    with pytest.raises(ValueError, match="percentile must be above 50"):
        engine.Calibration([np.ones(3)], percentile=50)
    with pytest.raises(ValueError, match="method must be 'minmax', 'percentile' or"):
        engine.Calibration([np.ones(3)], "mean")
