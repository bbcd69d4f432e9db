"""Runs whose networks really are smaller."""

import dataclasses
import sys
import types

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import cram_jax
from cram_jax.structure import group_masks, kept_groups, shrink
from experiments.batches import Examples
from experiments.commands.shrink import check_network, shrunken
from experiments.compression.targets import projector
from experiments.errors import ConfigError
from experiments.evaluation.open_run import open_run
from experiments.images.config import ImageConfig, ModelConfig
from experiments.images.data import Dataset
from experiments.images.models import read_layer_widths
from experiments.images.resnet import Bottleneck, ResNet
from experiments.images.task import classification, make_network
from experiments.kinds import prepare
from experiments.recipes import digits
from experiments.runs import checkpoints
from experiments.runs.stored_config import from_dict, to_dict
from experiments.text import kind
from experiments.text.question_answering import question_answering

pytestmark = pytest.mark.usefixtures("quick_compilation")


def images_of(side):
    """A data set of one image."""
    one = Examples({"image": np.zeros((1, side, side, 3), np.uint8)})
    return Dataset(one, one, classes=5, mean=np.zeros(3), std=np.ones(3))


def uneven(structure):
    """Groups of which every family keeps another share."""
    kept = np.ones(structure.size, bool)
    for number, family in enumerate(structure.families):
        kept[family.groups] = np.arange(family.size) % 7 > number % 5
    return kept


@pytest.mark.parametrize(("name", "side"), [("resnet20", 8), ("vgg16_bn_cifar", 32)])
def test_our_networks_are_built_with_the_widths_that_are_left(name, side):
    config = ImageConfig(model=ModelConfig(name=name))
    data = images_of(side)
    task = classification(config, data)
    structure = task.filters.channels.structure
    kept = uneven(structure)
    small_config = shrunken(config, data, structure, kept, "c40")
    assert len(set(small_config.model.layer_widths)) > 3
    assert from_dict(to_dict(small_config)) == small_config
    small_task = classification(small_config, data)
    check_network(config, task, small_task, kept)


class OwnNetwork(nnx.Module):
    """A block of EfficientNet between two convolutions: nothing of it is ours."""

    def __init__(self, channels, classes, rngs):
        def conv(i, o, size, **options):
            return nnx.Conv(i, o, size, use_bias=False, rngs=rngs, **options)

        self.stem, self.norm = conv(channels, 8, (3, 3)), nnx.BatchNorm(8, rngs=rngs)
        self.expand, self.norm1 = conv(8, 16, (1, 1)), nnx.BatchNorm(16, rngs=rngs)
        self.depthwise = conv(16, 16, (3, 3), feature_group_count=16)
        self.norm2 = nnx.BatchNorm(16, rngs=rngs)
        self.squeeze = nnx.Linear(16, 4, rngs=rngs)
        self.excite = nnx.Linear(4, 16, rngs=rngs)
        self.project = conv(16, 8, (1, 1))
        self.head = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, x, training):
        def norm(layer, x):
            return nnx.silu(layer(x, use_running_average=not training))

        x = norm(self.norm, self.stem(x))
        y = norm(self.norm2, self.depthwise(norm(self.norm1, self.expand(x))))
        gate = nnx.sigmoid(self.excite(nnx.silu(self.squeeze(y.mean((1, 2))))))
        x = x + self.project(y * gate[:, None, None])
        return self.head(x.mean((1, 2)))


def test_a_network_of_ones_own_is_built_with_the_widths_that_are_left(monkeypatch):
    own = types.ModuleType("own_network")
    own.make = OwnNetwork
    monkeypatch.setitem(sys.modules, "own_network", own)
    config = ImageConfig(model=ModelConfig(module="own_network:make"))
    data = images_of(8)
    task = classification(config, data)
    structure = task.filters.channels.structure
    kept = uneven(structure)
    small_config = shrunken(config, data, structure, kept, "c40")
    left = sorted(int(kept[family.groups].sum()) for family in structure.families)
    assert sorted(small_config.model.layer_widths) == left
    assert from_dict(to_dict(small_config)) == small_config
    small_task = classification(small_config, data)
    check_network(config, task, small_task, kept)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * np.cos(leaf), task.init(0))
    small = shrink(structure, variables, kept)
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_network(small_config, data, 0)))
    module = nnx.merge(graph, *small)
    assert module.depthwise.feature_group_count == small[0]["expand"]["kernel"].shape[3]
    batch = {"image": np.ones((2, 8, 8, 3), np.uint8)}
    masked = jax.tree.map(
        lambda mask, leaf: leaf * mask, group_masks(structure, kept), variables
    )
    np.testing.assert_allclose(
        small_task.predict(*small, batch), task.predict(*masked, batch), rtol=1e-4
    )

    again = dataclasses.replace(
        small_config,
        model=dataclasses.replace(small_config.model, layer_widths=(99, 1)),
    )
    with pytest.raises(ConfigError, match="layer_widths must be at most"):
        classification(again, data)


def test_the_widths_of_bottlenecks_are_read_in_the_order_of_the_network():
    widths = (5, 2, 3, 7, 4, 6, 9, *[8, 1, 9] * 10)

    def make():
        return ResNet(
            (4, 8),
            (1, 11),
            3,
            2,
            block=Bottleneck,
            layer_widths=widths,
            rngs=nnx.Rngs(0),
        )

    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(make), nnx.Param, ...)[1])
    leaves = jax.tree.leaves_with_path(params)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in leaves
    }
    assert read_layer_widths(shapes) == widths


def test_a_network_opens_although_the_targets_it_was_trained_for_no_longer_suit_it(
    tmp_path, data_dir
):
    """Blocks of four inputs divide none of the widths that are left."""
    model = ModelConfig(layer_widths=(13, 7, 13, 14, 13))
    config = dataclasses.replace(digits.blocks, model=model)
    _, task = prepare(config, data_dir)
    params, batch_stats = task.init(0)
    checkpoints.save_model(tmp_path / "small", config, params, batch_stats)
    opened = open_run(tmp_path / "small", data_dir, print)
    chex.assert_trees_all_equal(opened.params, params)
    chex.assert_trees_all_equal(opened.batch_stats, batch_stats)


def test_another_network_than_the_masked_one_is_refused():
    config = ImageConfig(model=ModelConfig(widths=(4, 8), blocks=(1, 1)))
    data = images_of(8)
    task = classification(config, data)
    kept = uneven(task.filters.channels.structure)
    message = r"resnet cannot be built .*: 0/head/kernel would have the shape \(8, 5\)"
    with pytest.raises(ConfigError, match=message):
        check_network(config, task, task, kept)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((4, 3, 4, 5), "must be those of 5 convolutions, got 4"),
        ((4, 3, 2, 5, 5), "the same where blocks of a stage are added, got 4 and 2"),
    ],
)
def test_widths_that_do_not_fit_a_network_are_refused(widths, message):
    model = ModelConfig(widths=(4, 8), blocks=(1, 1), layer_widths=widths)
    with pytest.raises(ConfigError, match=message):
        classification(ImageConfig(model=model), images_of(8))


def test_half_of_heads_and_units_leave_a_bert_with_the_same_answers(
    text_config, text_data, tmp_path
):
    bert = dataclasses.replace(
        text_config.model, num_attention_heads=4, num_hidden_layers=2
    )
    config = dataclasses.replace(text_config, model=bert)
    task = question_answering(config)
    params, _ = task.init(0)
    params = jax.tree.map(lambda p: p + 0.1 * np.cos(p), params)
    masked, masks = cram_jax.compress(params, projector("c50", filters=task.filters))
    coupled = task.filters.channels
    kept = kept_groups(coupled.of_params, masks)
    small_config = shrunken(config, text_data, coupled.structure, kept, "c50")
    assert sum(small_config.model.layer_heads) == 4
    assert sum(small_config.model.layer_units) == 64
    small_task = question_answering(small_config)
    check_network(config, task, small_task, kept)
    small, _ = shrink(coupled.structure, (masked, {}), kept)
    got = small_task.evaluate(small, {}, text_data.evaluation)
    wanted = task.evaluate(masked, {}, text_data.evaluation)
    assert got == pytest.approx(wanted, rel=1e-6)
    # transformers could not load it.
    out = tmp_path / "huggingface"
    with pytest.raises(ConfigError, match="BERTs with all their heads and units, not"):
        kind.export(small_config, (small, {}), tmp_path, out, None)
    assert not out.exists()
