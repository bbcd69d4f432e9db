from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from cram_jax import recalibrate

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCHES = [np.random.default_rng(seed).normal(2.0, 3.0, (16, 5)) for seed in range(4)]


def float64_statistics(weights, batches):
    """Mean and biased variance of each batch, averaged; naive on purpose."""
    outputs = [np.asarray(batch, np.float64) @ weights for batch in batches]
    return (
        np.mean([x.mean(0) for x in outputs], axis=0),
        np.mean([x.var(0) for x in outputs], axis=0),
    )


class LinenNet(linen.Module):
    momentum: float

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(3, use_bias=False)(x)
        return linen.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)


class NnxNet(nnx.Module):
    def __init__(self, momentum, rngs):
        self.dense = nnx.Linear(5, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_a_linen_variables_dict_is_recalibrated(momentum):
    model = LinenNet(momentum)
    variables = model.init(jax.random.key(0), BATCHES[0], train=True)

    @jax.jit
    def training_pass(params, batch_stats, batch):
        _, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch,
            train=True,
            mutable=["batch_stats"],
        )
        return updated["batch_stats"]

    stats = recalibrate(
        partial(training_pass, variables["params"]), variables["batch_stats"], BATCHES
    )
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    mean, variance = float64_statistics(kernel, BATCHES)
    # 1 - momentum is read from float32 statistics: 6e-8 / 0.01 at worst.
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], mean, rtol=3e-5)
    np.testing.assert_allclose(stats["BatchNorm_0"]["var"], variance, rtol=3e-5)


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_an_nnx_model_is_recalibrated(momentum):
    model = NnxNet(momentum, nnx.Rngs(0))
    graph, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def training_pass(params, batch_stats, batch):
        merged = nnx.merge(graph, params, batch_stats, copy=True)
        merged.train()
        merged(batch)
        return nnx.state(merged, nnx.BatchStat)

    stats = recalibrate(partial(training_pass, params), batch_stats, BATCHES)
    mean, variance = float64_statistics(np.float64(model.dense.kernel[...]), BATCHES)
    np.testing.assert_allclose(stats["norm"]["mean"][...], mean, rtol=3e-5)
    np.testing.assert_allclose(stats["norm"]["var"][...], variance, rtol=3e-5)
    assert jax.tree.structure(stats) == jax.tree.structure(batch_stats)


def test_float64_statistics_are_exact():
    with jax.enable_x64(True):

        def apply(stats, batch):
            return jax.tree.map(
                lambda old, new: 0.9 * old + 0.1 * new,
                stats,
                {"mean": batch.mean(0), "var": batch.var(0)},
            )

        old = {"mean": jnp.full(5, 7.0), "var": jnp.full(5, 9.0)}
        stats = recalibrate(apply, old, map(jnp.asarray, BATCHES))
        mean, variance = float64_statistics(np.eye(5), BATCHES)
        np.testing.assert_allclose(stats["mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(stats["var"], variance, rtol=1e-12)


def test_counters_keep_their_value():
    def apply(stats, batch):
        return {"count": stats["count"] + 1, "mean": 0.5 * stats["mean"] + 0.5 * batch}

    stats = recalibrate(
        apply, {"count": jnp.array(7), "mean": jnp.zeros(1)}, [jnp.ones(1)]
    )
    assert int(stats["count"]) == 7
    np.testing.assert_array_equal(stats["mean"], [1.0])


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="batches must hold at least one .* got none"):
        recalibrate(lambda stats, batch: stats, {"mean": jnp.zeros(3)}, [])


def test_a_model_in_evaluation_mode_is_refused():
    with pytest.raises(ValueError, match=r"apply must update batch_stats\['mean'\]"):
        recalibrate(lambda stats, batch: stats, {"mean": jnp.zeros(3)}, BATCHES)
