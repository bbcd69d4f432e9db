"""What allocations take and audits report, beside counts by hand."""

import jax
import numpy as np
import pytest

from cram_jax import compress, top_k
from cram_jax.paths import named_leaves
from experiments.commands.audit import Answers, report
from experiments.compression.targets import projector
from experiments.errors import ConfigError
from experiments.evaluation.allocation import (
    global_target,
    sparsities,
    uniform_target,
    weigh,
)
from experiments.evaluation.open_run import OpenRun

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def opened(config, data, task):
    return OpenRun(config, data, task, *task.init(0))


def kept(weighed, params):
    """What a network takes, from the zeros of each leaf."""
    leaves = dict(zip(weighed.leaves, params, strict=True))
    return sum(
        weighed.taken(path, float(np.mean(np.asarray(leaf) != 0)))
        for path, leaf in leaves.items()
        if leaf.ndim > 1
    )


def test_multiply_adds_are_those_of_the_layers(opened):
    """8x8 images, 4 channels, then 8 with a stride of 2; the kernels are 3x3."""
    weighed = weigh(opened, "multiply_adds", None, "u")
    prices = {path: weighed.taken(path, 1.0) for path in weighed.leaves}
    assert prices["stem/conv/kernel"] == 64 * 9 * 1 * 4
    assert prices["stage1_block1/conv1/kernel"] == 64 * 9 * 4 * 4
    assert prices["stage2_block1/conv1/kernel"] == 16 * 9 * 4 * 8
    assert prices["head/kernel"] == 8 * 4
    assert prices["head/bias"] == 0


def test_a_target_by_cost_weighs_a_weight_by_its_positions(opened):
    """At 64 pixels, behind the stride at 16, and once."""
    scale = opened.task.filters.channels.scale
    assert scale["stem/conv/kernel"] == scale["stage1_block1/conv2/kernel"] == 1 / 8
    assert scale["stage2_block1/conv1/kernel"] == 1 / 4
    assert scale["head/kernel"] == 1
    leaves = dict(named_leaves(opened.params))
    assert set(scale) == {path for path, leaf in leaves.items() if leaf.ndim > 1}
    chosen = projector("k50@cost", filters=opened.task.filters)
    assert chosen == top_k(0.5, scale=scale)


@pytest.mark.parametrize("speedup", [1.5, 3.0])
def test_uniform_and_global_masks_take_the_budget(speedup, opened):
    weighed = weigh(opened, "multiply_adds", None, "u")
    budget = weighed.total / speedup
    names = (
        uniform_target(weighed, "u", budget),
        global_target(weighed, "k", budget, None),
    )
    for name in names:
        chosen = projector(name, filters=opened.task.filters)
        params = jax.tree.leaves(compress(opened.params, chosen).params)
        # A weight takes at most 64 multiply-adds, and each layer rounds its count.
        assert kept(weighed, params) == pytest.approx(budget, abs=10 * 64)


def test_bytes_count_values_and_a_bit_each(opened):
    weighed = weigh(opened, "bytes", None, "u")
    path = "stage1_block1/conv1/kernel"
    size = 9 * 4 * 4
    # A quarter of four bytes, and a bit; of nearly all of them dense is less.
    assert weighed.taken(path, 0.25) == pytest.approx(size + size / 8)
    assert weighed.taken(path, 0.99) == 4 * size
    with pytest.raises(ConfigError, match="times fewer bytes cannot be reached"):
        uniform_target(weighed, "u", weighed.total / 1000)


def test_the_kept_share_falls_by_equal_factors():
    shares = sparsities(5)
    assert shares[0] == 0
    np.testing.assert_allclose(shares[[1, -1]], [0.4, 0.99])
    factors = (1 - shares[2:]) / (1 - shares[1:-1])
    np.testing.assert_allclose(factors, factors[0])


def test_a_report_counts_answers():
    labels = np.array([0, 0, 1, 1])
    dense = Answers(labels, np.eye(2)[labels])
    chances = np.array([[0.95, 0.05], [0.4, 0.6], [0.05, 0.95], [0.05, 0.95]])
    other = Answers(chances.argmax(axis=1), chances)
    found = report(other, dense, labels, np.array(["x", "y", "y", "y"]))
    assert found["accuracy"] == 0.75
    assert found["disagreement"] == found["broken"] == 0.25
    assert found["uncertain"] == 0.25
    assert found["by class"] == {"0": 0.5, "1": 1.0}
    assert found["by group"] == {"x": 1.0, "y": 2 / 3}
    guesses = np.full((4, 10), 0.1)  # as unsure as can be
    assert report(Answers(labels, guesses), dense, labels, None)["uncertain"] == 1
    # The bucket of 0.95 holds three right ones, that of 0.6 a wrong one.
    assert found["calibration error"] == pytest.approx(0.75 * 0.05 + 0.25 * 0.6)
    assert found["auc"] == 1.0
