"""What a target is on a BERT: the dense layers of its encoder, and nothing else."""

import functools
import re

import jax
import numpy as np
import pytest

from cram_jax import keep_pruned
from experiments.compression.options import Layerwise, PrunerOptions
from experiments.compression.second_order import SecondOrder
from experiments.evaluation.evaluation import make_evaluation
from experiments.text.network import ENCODER

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Query, key, value and output of the attention, 32x32, and two dense layers, 32x64.
KERNELS = 4 * 32 * 32 + 2 * 32 * 64


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def is_encoder_kernel(path):
    return re.fullmatch(r"bert/layer0/.*kernel", path) is not None


@pytest.fixture(scope="module")
def params(text_task):
    return text_task.init(0)[0]


@pytest.fixture(scope="module")
def evaluation(text_config, text_data, text_task):
    options = PrunerOptions(
        SecondOrder(gradients=8, block_size=8, recomputations=2, micro_batch=4),
        Layerwise(examples=8, batch=4),
    )
    return make_evaluation(text_config, text_data, text_task, options)


@pytest.fixture(scope="module")
def compress(evaluation, params):
    @functools.cache
    def run(target):
        pruned, masks = evaluation.compress(params, target, {})
        return by_path(pruned), by_path(masks)

    return run


def test_uniform_pruning_takes_the_same_share_of_every_dense_layer(compress, params):
    before = by_path(params)
    pruned, masks = compress("u60")
    chosen = [path for path in masks if is_encoder_kernel(path)]
    assert len(chosen) == 6
    for path, mask in masks.items():
        # size - floor(0.6 size) are kept
        kept = mask.size - mask.size * 6 // 10 if path in chosen else mask.size
        assert mask.sum() == kept, path
        np.testing.assert_array_equal(pruned[path], np.where(mask, before[path], 0))


@pytest.mark.parametrize("target", ["k60", "o60"])
def test_a_share_of_all_dense_layers_together(target, compress, params):
    pruned, masks = compress(target)
    kept = {path: mask.sum() for path, mask in masks.items() if is_encoder_kernel(path)}
    assert sum(kept.values()) == KERNELS - KERNELS * 6 // 10
    assert len({count / masks[path].size for path, count in kept.items()}) > 1
    for path, value in by_path(params).items():
        if path not in kept:
            np.testing.assert_array_equal(pruned[path], value)
        assert not pruned[path][~masks[path]].any()


def test_second_order_pruning_moves_what_it_keeps(compress, params):
    path = "bert/layer0/intermediate/kernel"
    pruned, masks = compress("o60")
    mask = masks[path]
    assert not np.array_equal(pruned[path][mask], by_path(params)[path][mask])


def test_second_order_pruning_composes_with_quantisation(compress):
    path = "bert/layer0/intermediate/kernel"
    pruned, masks = compress("o60")
    both, same = compress("o60+4bit")
    np.testing.assert_array_equal(masks[path], same[path])
    step = np.abs(pruned[path]).max(0) / 7
    np.testing.assert_allclose(
        both[path], np.rint(pruned[path] / step) * step, rtol=1e-5
    )


@pytest.mark.parametrize("target", ["w60", "g60", "ru60"])
def test_layerwise_pruning_is_of_every_dense_layer(target, compress, params):
    before = by_path(params)
    pruned, masks = compress(target)
    for path, mask in masks.items():
        if not is_encoder_kernel(path):
            np.testing.assert_array_equal(pruned[path], before[path])
            continue
        # Each of Wanda's outputs loses as many inputs.
        columns = mask.shape[1] if target == "w60" else 1
        size = mask.size // columns
        assert mask.sum() == columns * (size - size * 6 // 10), path
        assert not pruned[path][~mask].any()
        moved = not np.array_equal(pruned[path][mask], before[path][mask])
        assert moved == (target != "w60"), path


def test_embeddings_and_heads_are_no_target(compress, params):
    pruned, _ = compress("2:4+4bit")
    changed = {
        path
        for path, value in by_path(params).items()
        if not np.array_equal(pruned[path], value)
    }
    assert changed == {path for path in changed if is_encoder_kernel(path)}
    assert len(changed) == 6


def test_only_zeros_of_the_encoder_are_kept(params):
    """A zero in an embedding, such as that of padding, is a weight like others."""
    params = jax.tree.map(np.array, params)
    params["bert"]["embeddings"]["word"]["embedding"][:] = 0
    params["bert"]["layer0"]["output"]["kernel"][:] = 0
    masks = by_path(keep_pruned(where=ENCODER.prunable).init(params).masks)
    pruned = {path for path, mask in masks.items() if not mask.all()}
    assert pruned == {"bert/layer0/output/kernel"}
