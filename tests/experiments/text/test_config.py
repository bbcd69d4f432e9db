"""Configurations of runs on text, and the recipes."""

import dataclasses
import functools
import json
import math
import typing

import jax
import numpy as np
import pytest
from target_forms import of_each_form

import cram_jax
from experiments.batches import Examples
from experiments.compression.targets import check, label, projector, sparsity
from experiments.config import OptimizerConfig
from experiments.errors import ConfigError
from experiments.images.config import ImageConfig
from experiments.recipes import IMAGE_RECIPES, TEXT_RECIPES
from experiments.runs.directory import load_config, save_config
from experiments.runs.stored_config import differences, from_dict, to_dict
from experiments.text.config import (
    BertModelConfig,
    TaskName,
    TextConfig,
    TextDataConfig,
)
from experiments.text.data import TextDataset
from experiments.text.glue import TASKS
from experiments.text.kind import text_task
from experiments.training.step import init_state, make_train_step

# As Hugging Face's models of these shapes have parameters, with their task heads:
# google-bert/bert-base-uncased without its pooler, and with it.
SIZES = {"squad": 108_893_186, "sst2": 109_483_778}


@pytest.mark.parametrize("config", TEXT_RECIPES.values(), ids=TEXT_RECIPES)
def test_a_configuration_survives_json(config, tmp_path):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    save_config(tmp_path, config)
    assert load_config(tmp_path) == config


def test_a_run_that_does_not_say_its_kind_is_on_images():
    values = to_dict(ImageConfig(seed=3))
    assert values.pop("kind") == "images"
    assert from_dict(values) == ImageConfig(seed=3)


def test_differences_are_named_across_kinds():
    one = TextConfig()
    other = dataclasses.replace(one, data=TextDataConfig(stride=64), weights="w")
    assert differences(other, one) == {"data.stride": 64, "weights": "w"}
    assert {"kind", "data.stride", "weights"} <= set(differences(one, ImageConfig()))


def test_the_tasks_are_squad_those_of_glue_and_own_files():
    assert set(typing.get_args(TaskName)) == {"squad", *TASKS, "file"}


def test_no_recipe_hides_another():
    assert not set(IMAGE_RECIPES) & set(TEXT_RECIPES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TextDataConfig(name="mnist"),
            "name must be one of squad, cola, .*got",
        ),
        (lambda: TextDataConfig(stride=-1), "stride must be at least 0, got -1"),
        (lambda: TextDataConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: BertModelConfig(dtype="int8"), "dtype must be one of float32, bfloat"),
        (lambda: BertModelConfig(num_attention_heads=5), "must divide hidden_size=768"),
        (
            lambda: TextConfig(data=TextDataConfig(max_length=513)),
            "max_length must be at most 512, the positions, got 513",
        ),
        (
            lambda: TextConfig(data=TextDataConfig(name="rte"), train_file="x"),
            "train_file must be left out for rte, got 'x'",
        ),
        (lambda: TextConfig(patience=-1), "patience must be at least 0, got -1"),
        (
            lambda: TextConfig(patience=1, evaluate_every=0),
            "patience must be 0 if evaluate_every is 0, got 1",
        ),
        (
            lambda: TextConfig(eval_targets=("o100",)),
            "'o100': sparsity must be below 100 %",
        ),
        (
            lambda: OptimizerConfig(train_targets=("o50",)),
            "'o50' looks at a trained network",
        ),
        (lambda: OptimizerConfig(base="lion"), "base must be one of sgd, adam, got"),
        (lambda: OptimizerConfig(schedule="step"), "schedule must be one of cosine"),
        (
            lambda: OptimizerConfig(plain_steps=1.0),
            "plain_steps must be at least 0 and",
        ),
        (lambda: OptimizerConfig(frozen="("), "frozen must be a regular expression"),
        (lambda: from_dict({"kind": "sound"}), "kind must be one of images, text, got"),
        (
            lambda: from_dict({"kind": "text", "model": {"widths": 3}}),
            "BertModelConfig has no 'widths'",
        ),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_second_order_targets_are_for_evaluation():
    check("o90")
    assert label("o90") == "90 % second order"
    check("o90+4bit")
    assert label("o90+4bit") == "90 % second order + 4-bit"
    assert sparsity("o90") is None
    with pytest.raises(ConfigError, match="'o90' needs a trained network"):
        projector("o90")


def abstract_data(config):
    """Rows of the right shapes, one batch of them."""
    names = ["input_ids", "attention_mask", "token_type_ids"]
    shape = (config.data.batch_size, config.data.max_length)
    arrays = {name: np.zeros(shape, np.int32) for name in names}
    labels = ("start", "end") if config.data.name == "squad" else ("label",)
    rows = Examples(arrays | {name: np.zeros(shape[0], np.int32) for name in labels})
    return TextDataset(rows, rows)


@functools.cache
def network_of(data, model, label_smoothing):
    """A task and the shapes of its parameters, once for all recipes that share it."""
    task = text_task(
        TextConfig(data=data, model=model, label_smoothing=label_smoothing)
    )
    return task, jax.eval_shape(task.init, 0)


def recipe(name):
    config = TEXT_RECIPES[name]
    if config.data.name == "file":  # whose training file has the labels
        labels = dataclasses.replace(config.data, labels=("no", "yes"))
        config = dataclasses.replace(config, data=labels)
    return config


@pytest.mark.parametrize("name", TEXT_RECIPES)
def test_every_recipe_builds_abstractly(name):
    config = recipe(name)
    task, model = network_of(config.data, config.model, config.label_smoothing)
    data = abstract_data(config)
    state = jax.eval_shape(lambda model: init_state(config, data, task, model), model)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)]
    assert sum(sizes) == SIZES.get(name, sum(sizes))
    # Of Adam there are two moments for what is trained, and none for embeddings.
    trained = {k: v for k, v in state.params["bert"].items() if k != "embeddings"}
    trained |= {k: v for k, v in state.params.items() if k != "bert"}
    moments = [
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(state.opt_state)
        if leaf.dtype == np.float32
    ]
    counts = [math.prod(leaf.shape) for leaf in jax.tree.leaves(trained)]
    # Of the others there is the compressed loss.
    scalars = 0 if config.optimizer.rule in ("none", "gradual") else 1
    assert sum(moments) == 2 * sum(counts) + scalars


@pytest.mark.parametrize("name", ["own_texts", "squad", "sst2_small"])
def test_every_model_can_be_compressed_to_the_targets_of_its_recipes(name):
    config = recipe(name)
    alike = [c for c in TEXT_RECIPES.values() if c.data.name == config.data.name]
    task, (params, _) = network_of(config.data, config.model, config.label_smoothing)
    for target in of_each_form(target for c in alike for target in c.eval_targets):
        pruned, _ = jax.eval_shape(
            lambda params, t=target: cram_jax.compress(
                params, projector(t, filters=task.filters)
            ),
            params,
        )
        assert jax.tree.structure(pruned) == jax.tree.structure(params)


@pytest.mark.parametrize("name", ["squad_small", "sst2_small_sparse_finetune"])
def test_a_step_of_a_recipe_traces(name):
    config = TEXT_RECIPES[name]
    model = dataclasses.replace(config.model, num_hidden_layers=1)
    config = dataclasses.replace(config, model=model)
    data, task = abstract_data(config), text_task(config)
    state = jax.eval_shape(lambda: init_state(config, data, task))
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), data.train.arrays
    )
    after, _ = jax.eval_shape(make_train_step(config, data, task), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
