"""What `recalibrate` refuses, and what it says."""

import types

import jax
import jax.numpy as jnp
import pytest
from averages import (
    BATCHES,
)

from cram_jax import recalibrate

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (jnp.ones((2, 3)), "batches must be an iterable of batches, got an array; put"),
        ({"image": jnp.ones((2, 3))}, "batches must be .*, got a dict; put a single"),
        (3, "batches must be an iterable of batches, got a int"),
    ],
)
def test_a_batch_instead_of_batches_is_refused(batches, message):
    apply = averaging(lambda old, new: 0.9 * old + 0.1 * new)
    with pytest.raises(TypeError, match=message):
        recalibrate(apply, {"mean": jnp.zeros(3)}, batches)
    with pytest.raises(TypeError, match="apply must be a function, got {'mean'"):
        recalibrate({"mean": jnp.zeros(3)}, apply, [jnp.ones((2, 3))])
