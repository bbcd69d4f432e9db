"""Recalibrated statistics against float64 means over the batches.

The relative tolerance of float32 is 2^-24 / (1 - momentum) for the rounding of the
momentum, and the same again for that of 1 - momentum, beside some units of the batch
statistic itself.
"""

import types
import warnings
from functools import partial

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given
from hypothesis import strategies as st

from cram_jax import recalibrate

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCHES = [
    np.random.default_rng(seed).normal(2.0, 3.0, (16, 5)).astype(np.float32)
    for seed in range(4)
]


def float64_statistics(batches, weights=None):
    """Mean and biased variance of each batch, averaged; naive on purpose."""
    outputs = [np.asarray(batch, np.float64) for batch in batches]
    if weights is not None:
        outputs = [batch @ np.asarray(weights, np.float64) for batch in outputs]
    return (
        np.mean([x.mean(0) for x in outputs], axis=0),
        np.mean([x.var(0) for x in outputs], axis=0),
    )


def tolerance(momentum):
    return 2**-23 / (1 - momentum) + 1e-6


def moving_average(stats, new, momentum):
    return jax.tree.map(
        lambda old, value: momentum * old + (1 - momentum) * value, stats, new
    )


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


class LinenNet(linen.Module):
    momentum: float
    frozen: bool = False

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(3, use_bias=False)(x)
        x = linen.BatchNorm(
            use_running_average=self.frozen or not train, momentum=self.momentum
        )(x)
        x = linen.Dense(3, use_bias=False)(x)
        return linen.BatchNorm(
            use_running_average=not train, momentum=self.momentum, name="last"
        )(x)


def linen_pass(model):
    @jax.jit
    def training_pass(params, batch_stats, batch):
        _, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch,
            train=True,
            mutable=["batch_stats"],
        )
        return updated["batch_stats"]

    return training_pass


def kernel(params, name):
    return np.asarray(params[name]["kernel"], np.float64)


@pytest.mark.parametrize(
    ("momentum", "dtype"),
    [(0.0, "float32"), (0.9, "float32"), (0.99, "bfloat16"), (0.999, "bfloat16")],
)
def test_a_linen_variables_dict_is_recalibrated(momentum, dtype):
    model = LinenNet(momentum)
    variables = model.init(jax.random.key(0), BATCHES[0], train=True)
    params = variables["params"]
    old = jax.tree.map(lambda s: s.astype(dtype), variables["batch_stats"])
    stats = recalibrate(partial(linen_pass(model), params), old, BATCHES)
    mean, variance = float64_statistics(BATCHES, kernel(params, "Dense_0"))
    # bfloat16 has 8 bits, so rounds by up to 2^-8.
    rtol = tolerance(momentum) + 1e-5 + (2**-8 if dtype == "bfloat16" else 0)
    first = jax.tree.map(np.float64, stats["BatchNorm_0"])
    np.testing.assert_allclose(first["mean"], mean, rtol=rtol)
    np.testing.assert_allclose(first["var"], variance, rtol=rtol)
    assert stats["last"]["mean"].dtype == dtype
    # The second normalisation sees what the batch's own statistics normalise.
    hidden = [x.astype(np.float64) @ kernel(params, "Dense_0") for x in BATCHES]
    hidden = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in hidden]
    _, variance = float64_statistics(hidden, kernel(params, "Dense_1"))
    np.testing.assert_allclose(np.float64(stats["last"]["var"]), variance, rtol=rtol)


def test_a_frozen_normalisation_keeps_its_statistics_and_normalises_with_them():
    model = LinenNet(0.99, frozen=True)
    variables = model.init(jax.random.key(0), BATCHES[0], train=True)
    params = variables["params"]
    old = variables["batch_stats"] | {
        "BatchNorm_0": {"mean": jnp.arange(3.0), "var": jnp.arange(1.0, 4)}
    }
    stats = recalibrate(partial(linen_pass(model), params), old, BATCHES)
    jax.tree.map(
        np.testing.assert_array_equal, stats["BatchNorm_0"], old["BatchNorm_0"]
    )
    hidden = [
        (np.float64(x) @ kernel(params, "Dense_0") - np.arange(3.0))
        / np.sqrt(np.arange(1.0, 4) + 1e-5)
        for x in BATCHES
    ]
    mean, variance = float64_statistics(hidden, kernel(params, "Dense_1"))
    np.testing.assert_allclose(
        stats["last"]["mean"], mean, rtol=tolerance(0.99), atol=1e-6
    )
    np.testing.assert_allclose(stats["last"]["var"], variance, rtol=tolerance(0.99))


class NnxNet(nnx.Module):
    def __init__(self, momentum, rngs):
        self.dense = nnx.Linear(5, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


def nnx_passes(model):
    """The same pass as users write it: pure, and writing into what it is handed."""
    graph, params, _ = nnx.split(model, nnx.Param, nnx.BatchStat)

    def merged(copy, batch_stats, batch):
        model = nnx.merge(graph, params, batch_stats, copy=copy)
        model.train()
        model(batch)
        return nnx.state(model, nnx.BatchStat)

    def updated(batch_stats, batch):
        nnx.update(model, batch_stats)
        model.train()
        model(batch)
        return nnx.state(model, nnx.BatchStat)

    return {
        "jitted": jax.jit(partial(merged, True)),
        "merge": partial(merged, False),
        "update": updated,
    }


@pytest.mark.parametrize("form", ["jitted", "merge", "update"])
def test_an_nnx_model_is_recalibrated_even_if_a_pass_writes_into_its_statistics(form):
    model = NnxNet(0.99, nnx.Rngs(0))
    batch_stats = nnx.state(model, nnx.BatchStat)
    stats = recalibrate(nnx_passes(model)[form], batch_stats, BATCHES)
    mean, variance = float64_statistics(BATCHES, model.dense.kernel[...])
    np.testing.assert_allclose(stats["norm"]["mean"][...], mean, rtol=tolerance(0.99))
    np.testing.assert_allclose(
        stats["norm"]["var"][...], variance, rtol=tolerance(0.99)
    )
    assert jax.tree.structure(stats) == jax.tree.structure(batch_stats)


def test_a_pass_may_donate_its_statistics_and_return_its_own_buffers():
    buffers = {"mean": np.zeros(5, np.float32)}

    def apply(stats, batch):
        buffers["mean"][:] = donating(stats["mean"], batch)
        return buffers

    @partial(jax.jit, donate_argnums=0)
    def donating(mean, batch):
        return 0.9 * mean + 0.1 * batch.mean(0)

    stats = {"mean": jnp.ones(5)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CPU may not use what is donated
        found = recalibrate(apply, stats, BATCHES)
    np.testing.assert_allclose(
        found["mean"], float64_statistics(BATCHES)[0], rtol=tolerance(0.9)
    )
    np.testing.assert_array_equal(stats["mean"], np.ones(5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_haikus_bias_corrected_averages_are_recalibrated(dtype):
    def network(batch, train):
        return hk.BatchNorm(True, True, 0.99)(batch, is_training=train)

    model = hk.transform_with_state(network)
    params, start = model.init(jax.random.key(0), BATCHES[0], True)
    batches = [jnp.asarray(batch, dtype) for batch in BATCHES]
    apply = jax.jit(lambda state, batch: model.apply(params, state, None, batch, True))
    mean, variance = float64_statistics(batches)
    # Haiku computes the statistics of a batch in its dtype.
    rtol = tolerance(0.99) + (1e-5 if dtype == "float32" else 0.03)
    for steps in (0, 3, 500, 5000):
        state = jax.tree.map(
            lambda leaf, n=steps: leaf + n if leaf.dtype == jnp.int32 else leaf + 7,
            start,
        )
        found = recalibrate(lambda *args: apply(*args)[1], state, batches)
        for name, expected in (("mean", mean), ("var", variance)):
            average = found[f"batch_norm/~/{name}_ema"]
            for entry in ("average", "hidden"):
                np.testing.assert_allclose(
                    np.float64(average[entry][0]), expected, rtol=rtol
                )
        output, _ = model.apply(params, found, None, BATCHES[0], False)
        expected = (np.float64(BATCHES[0]) - mean) / np.sqrt(variance + 1e-5)
        if dtype == "float32":
            np.testing.assert_allclose(output, expected, atol=1e-4)


class EquinoxNet(eqx.Module):
    layers: list

    def __init__(self, mode):
        keys = jax.random.split(jax.random.key(0))
        self.layers = [
            eqx.nn.Linear(5, 3, use_bias=False, key=keys[0]),
            eqx.nn.BatchNorm(3, "batch", mode=mode),
            eqx.nn.Linear(3, 3, use_bias=False, key=keys[1]),
            eqx.nn.BatchNorm(3, "batch", mode=mode),
        ]

    def __call__(self, x, state, inference):
        seen = []
        for layer in self.layers:
            if isinstance(layer, eqx.nn.BatchNorm):
                seen.append(x)
                x, state = layer(x, state, inference=inference)
            else:
                x = layer(x)
        return seen, x, state


@pytest.mark.parametrize("mode", ["ema", "batch"])
@pytest.mark.parametrize("jitted", [True, False])
def test_equinoxs_averages_are_recalibrated(mode, jitted):
    """In "ema" the second normalisation depends on the statistics of the first.

    In "batch" inference divides by 1 - momentum^count, here of 3 passes.
    """
    model, state = eqx.nn.make_with_state(EquinoxNet)(mode)
    call = jax.vmap(
        model,
        axis_name="batch",
        in_axes=(0, None, None),
        out_axes=(0, 0, None),
    )

    def apply(state, batch):
        return call(batch, state, False)[2]

    for _ in range(3):
        state = apply(state, BATCHES[0])
    found = recalibrate(eqx.filter_jit(apply) if jitted else apply, state, BATCHES)

    first = [np.float64(x) @ np.float64(model.layers[0].weight).T for x in BATCHES]
    normal = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in first]
    second = [x @ np.float64(model.layers[2].weight).T for x in normal]
    inputs, outputs, _ = call(BATCHES[0], found, True)
    normalised = inputs[1] @ np.linalg.inv(np.float64(model.layers[2].weight).T)
    for x, y, (mean, variance) in (
        (inputs[0], normalised, float64_statistics(first)),
        (inputs[1], outputs, float64_statistics(second)),
    ):
        expected = (np.float64(x) - mean) / np.sqrt(variance + 1e-5)
        np.testing.assert_allclose(y, expected, atol=1e-3)


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


def test_many_batches_are_summed_without_losing_digits():
    """A sum of these in float32 would lose all but the first."""
    batches = [np.full(1, 1.0 if i else 2.0**24, np.float32) for i in range(200)]

    def apply(stats, batch):
        return {"mean": 0.5 * stats["mean"] + 0.5 * batch}

    stats = recalibrate(apply, {"mean": np.zeros(1, np.float32)}, batches)
    np.testing.assert_allclose(stats["mean"], np.mean(batches, dtype=np.float64))


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


def averaging(update):
    """A pass over statistics of one leaf, "mean"."""
    return lambda stats, batch: {"mean": update(stats["mean"], batch.mean(0))}


def dropping(random=types.SimpleNamespace(state=0)):  # noqa: B008
    def update(old, new):
        random.state += 1
        return 0.9 * old + 0.1 * new * (1 + random.state % 3)

    return update


@pytest.mark.parametrize(
    ("update", "error", "message"),
    [
        (
            lambda old, new: old,
            ValueError,
            r"apply must update batch_stats\['mean'\] by a training-mode pass, but "
            "left everything unchanged",
        ),
        (
            lambda old, new: old + new,
            ValueError,
            r"average batch_stats\['mean'\] with a fixed momentum, but adds to it",
        ),
        (
            lambda old, new: (0.9 * old + 0.1 * new).astype(jnp.bfloat16),
            TypeError,
            r"return batch_stats\['mean'\] as float32, .* got bfloat16",
        ),
        (
            lambda old, new: (1 - 1e-6) * old + 1e-6 * new,
            ValueError,
            r"keep at most 0.999969 of the old batch_stats\['mean'\]",
        ),
        (
            lambda old, new: 0.9 * old + 0.1 * new * jnp.nan,
            ValueError,
            r"return a finite batch_stats\['mean'\], whatever",
        ),
        (
            lambda old, new: (0.9 * old + 0.1 * new)[:2],
            ValueError,
            r"return batch_stats\['mean'\] in its shape \(5,\), got \(2,\)",
        ),
        (
            lambda old, new: 0.9 * old + 0.1 * jnp.cos(100 * old) + new,
            ValueError,
            "they did not settle in 3 passes",
        ),
        (dropping(), ValueError, "two passes from the same statistics differed"),
    ],
)
def test_what_is_no_moving_average_is_refused_with_the_reason(update, error, message):
    with pytest.raises(error, match=message):
        recalibrate(averaging(update), {"mean": jnp.ones(5)}, BATCHES)


def test_a_batch_without_finite_statistics_is_named():
    batches = [BATCHES[0], jnp.full((2, 5), jnp.inf)]
    apply = averaging(lambda old, new: 0.9 * old + 0.1 * new)
    with pytest.raises(ValueError, match=r"finite .*\['mean'\], but .* batch 1 is not"):
        recalibrate(apply, {"mean": jnp.ones(5)}, batches)


def test_a_pass_that_cannot_take_wider_statistics_is_told_why_it_got_them():
    def apply(stats, batch):
        return {"mean": jax.lax.select(True, stats["mean"], jnp.bfloat16(batch[0]))}

    with pytest.raises(TypeError) as error:
        recalibrate(apply, {"mean": jnp.ones(5, jnp.bfloat16)}, BATCHES)
    assert "batch_stats of ['bfloat16'] as float32" in error.value.__notes__[-1]


def test_another_structure_is_refused():
    with pytest.raises(ValueError, match=r"the leaves \[.*'mean'.*\], got \[.*'stats"):
        recalibrate(
            lambda stats, batch: {"stats": stats}, {"mean": jnp.ones(5)}, BATCHES
        )


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="batches must hold at least one .* got none"):
        recalibrate(lambda stats, batch: stats, {"mean": jnp.zeros(3)}, [])


def test_traced_statistics_are_refused():
    apply = averaging(lambda old, new: 0.9 * old + 0.1 * new)
    with pytest.raises(TypeError, match="must be called outside jit"):
        jax.jit(lambda stats: recalibrate(apply, stats, BATCHES))({"mean": jnp.ones(5)})
