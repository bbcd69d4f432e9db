"""Accumulation, shares of a batch, and averaging of weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.errors import ConfigError
from experiments.training.step import (
    accumulated,
    init_state,
    make_train_step,
    two_parts,
)

KEY = jax.random.key(0)


def loss_fn(params, batch_stats, batch, dropout_key=None):
    """The mean of squares, and how often it was called."""
    predicted = batch["x"] @ params
    return jnp.mean((predicted - batch["y"]) ** 2), batch_stats + 1


def test_accumulated_gradients_are_those_of_the_whole_batch():
    generator = np.random.default_rng(0)
    batch = {"x": generator.normal(size=(12, 3)), "y": generator.normal(size=12)}
    batch = jax.tree.map(jnp.asarray, batch)
    params = jnp.array([0.5, -1.0, 2.0])
    whole = jax.value_and_grad(loss_fn, has_aux=True)(params, 0, batch)
    parts = jax.value_and_grad(accumulated(loss_fn, 4), has_aux=True)(params, 0, batch)
    np.testing.assert_allclose(parts[0][0], whole[0][0], rtol=1e-5)  # order of sums
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-5)
    assert (whole[0][1], parts[0][1]) == (1, 4)


def test_every_part_has_a_dropout_key_of_its_own():
    def drawn(params, batch_stats, batch, dropout_key):
        return jax.random.uniform(dropout_key), batch_stats

    batch = {"x": jnp.zeros((6, 1))}
    loss, _ = accumulated(drawn, 3)(jnp.zeros(1), 0, batch, KEY)
    expected = np.mean([jax.random.uniform(key) for key in jax.random.split(KEY, 3)])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_parts_have_to_divide_the_batch():
    with pytest.raises(ConfigError, match="accumulate must divide the 6 examples"):
        accumulated(loss_fn, 4)(jnp.zeros(1), 0, {"x": jnp.zeros((6, 1))})


@pytest.mark.parametrize(
    ("share", "first", "last"),
    [
        (1.0, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.75, [0, 1, 2, 4, 5, 6], [1, 2, 3, 5, 6, 7]),
        (0.625, [0, 1, 2, 3, 4], [3, 4, 5, 6, 7]),
        (0.25, [0, 4], [3, 7]),
        (0.01, [0], [7]),
    ],
)
def test_each_gradient_gets_its_share_of_the_batch(share, first, last):
    batch = {"image": np.arange(16).reshape(8, 2), "label": np.arange(8)}
    dense, compressed = two_parts(batch, share)
    for part, rows in ((dense, first), (compressed, last)):
        np.testing.assert_array_equal(part["label"], rows)
        np.testing.assert_array_equal(part["image"], batch["image"][rows])


@pytest.mark.usefixtures("quick_compilation")
def test_the_average_follows_the_weights(with_method, data, task):
    config = with_method("none", ema=0.75)
    config = dataclasses.replace(config, epochs=1)
    step = make_train_step(config, data, task)
    state = init_state(config, data, task)
    average = np.array(state.params["head"]["kernel"], np.float64)
    for batch in data.train.training_batches(8, 0, 0, 3):
        state, _ = step(state, batch)
        average = 0.75 * average + 0.25 * np.array(state.params["head"]["kernel"])
    np.testing.assert_allclose(state.ema["head"]["kernel"], average, rtol=1e-5)
    assert state.judged is state.ema


@pytest.mark.usefixtures("quick_compilation")
def test_plain_steps_are_a_random_share_of_the_steps(with_method, data, task):
    """Each step is that of CrAM+ or of SGD, by its number."""
    configured = functools.partial(with_method, train_targets=("k50",), warmup=0.0)
    configs = (
        configured("cram_plus", plain_steps=0.75),
        configured("none"),
        configured("cram_plus"),
    )
    steps = [(each, make_train_step(each, data, task)) for each in configs]
    (batch,) = data.train.training_batches(8, 0, 0, 1)

    def kernel_after(number, config, step):
        state = init_state(config, data, task)._replace(step=jnp.int32(number))
        return np.asarray(step(state, batch)[0].params["head"]["kernel"])

    drawn = []
    for number in range(40):
        mixed, plain, cram = (kernel_after(number, *each) for each in steps)
        is_plain = np.array_equal(mixed, plain)
        assert is_plain != np.array_equal(mixed, cram)
        drawn.append(is_plain)
    assert 24 <= sum(drawn) <= 36  # 30, within 2.2 deviations
