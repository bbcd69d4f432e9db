import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from target_forms import of_each_form

import cram_jax
from experiments.batches import Examples
from experiments.compression.targets import projector
from experiments.errors import ConfigError, NonFiniteLoss, RunError
from experiments.images.catalogue import CATALOGUE, DatasetInfo
from experiments.images.data import Dataset
from experiments.images.resnet import ResNet, space_to_depth
from experiments.images.task import classification
from experiments.recipes import IMAGE_RECIPES
from experiments.runs.checkpoints import save_model
from experiments.runs.directory import load_config, save_config
from experiments.training.loop import train
from experiments.training.step import init_state, make_train_step, total_steps

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Those that prune during training have tests of their own, in methods/.
METHODS = ("none", "sam", "cram", "cram_plus", "topk_plus")


def first_batch(config, data):
    return next(data.train.training_batches(config.data.batch_size, 0, 0, 1))


def equal(one, other):
    def raw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    same = jax.tree.map(lambda a, b: np.array_equal(raw(a), raw(b)), one, other)
    return all(jax.tree.leaves(same))


def first_of_each(key):
    """The names of configurations, one for each value of the key."""
    names = {}
    for name, config in IMAGE_RECIPES.items():
        names.setdefault(key(config), name)
    return list(names.values())


def rule(config):
    """What traces differently in an optimiser; numbers alone do not."""
    rule = dataclasses.replace(config.optimizer, rho=0.0, learning_rate=1.0)
    return dataclasses.replace(rule, warmup=0.0, train_targets=rule.train_targets[:1])


def abstract_data(config):
    """A data set of the right shapes that takes no memory."""
    entry = CATALOGUE.get(config.data.name)
    if entry is None:  # images of the user's own
        entry = DatasetInfo("folder", size=(config.data.side, config.data.side))
    channels = 1 if config.data.name == "digits" else 3
    shape = (config.data.batch_size, *(entry.size or (224, 224)), channels)
    labels = np.zeros(config.data.batch_size, np.int32)
    images = Examples({"image": np.broadcast_to(np.uint8(0), shape), "label": labels})
    ones = np.ones(channels, np.float32)
    return Dataset(images, images, entry.classes, ones, ones)


SIZES = {
    "digits": 19_706,
    "cifar10": 272_474,
    "cifar10_small": 79_338,
    # As torchvision counts.
    "imagenet": 25_557_032,
}


@functools.cache
def network_of(name):
    """The data, the task and the shapes of the variables of a configuration."""
    config = IMAGE_RECIPES[name]
    data = abstract_data(config)
    task = classification(config, data)
    return data, task, jax.eval_shape(task.init, 0)


MODELS = first_of_each(lambda config: config.model)
# The rules by themselves are traced below; by night each with its model.
BUILT = [
    pytest.param(name, marks=[] if name in MODELS else [pytest.mark.nightly])
    for name in first_of_each(lambda config: (config.model, rule(config)))
]


@pytest.mark.parametrize("name", BUILT)
def test_every_configuration_builds_abstractly(name):
    config = IMAGE_RECIPES[name]
    data, task, model = network_of(name)
    state = jax.eval_shape(lambda model: init_state(config, data, task, model), model)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)]
    assert sum(sizes) == SIZES.get(name, sum(sizes))


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_every_configuration_names_a_data_set_that_we_know(name):
    config = IMAGE_RECIPES[name]
    assert config.data.name in {*CATALOGUE, "folder"}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_compressed_to_the_targets_of_its_configurations(name):
    config = IMAGE_RECIPES[name]
    alike = [c for c in IMAGE_RECIPES.values() if c.model == config.model]
    targets = of_each_form(target for c in alike for target in c.eval_targets)
    _, task, (params, _) = network_of(name)
    for target in targets:
        pruned, _ = jax.eval_shape(
            lambda params, t=target: cram_jax.compress(
                params, projector(t, filters=task.filters)
            ),
            params,
        )
        assert jax.tree.structure(pruned) == jax.tree.structure(params)


@pytest.mark.parametrize("name", first_of_each(rule))
def test_a_step_of_every_rule_traces(name, config):
    """On a small network: those of the configurations are long to trace."""
    config = dataclasses.replace(IMAGE_RECIPES[name], model=config.model)
    data = abstract_data(config)
    task = classification(config, data)
    state = jax.eval_shape(lambda: init_state(config, data, task))
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), data.train.arrays
    )
    after, metrics = jax.eval_shape(
        make_train_step(config, data, task), state, abstract
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    dense = ("none", "gradual", "acdc", "rigl")
    compressed = set() if config.optimizer.rule in dense else {"compressed_loss"}
    assert set(metrics) == {"loss", "learning_rate"} | compressed


def test_patches_become_channels_in_front_of_the_stem(config, data):
    """A stem on patches of 2x2 is a convolution of stride 2 with kernels of 6x6."""
    model = dataclasses.replace(config.model, patch=2)
    task = classification(dataclasses.replace(config, model=model), data)
    kernel = task.init(0)[0]["stem"]["conv"]["kernel"]
    network = ResNet((4, 8), (1, 1), 1, 4, patch=2, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    assert kernel.shape == network.stem["conv"].kernel.shape == (3, 3, 4, 4)

    folded = network.stem["conv"].kernel[...].reshape(3, 3, 2, 2, 4)
    wide = folded.transpose(0, 2, 1, 3, 4).reshape(6, 6, 1, 4)
    expected = jax.lax.conv_general_dilated(
        images, wide, (2, 2), [(2, 2)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    inside = network.stem["conv"](space_to_depth(images, 2))
    np.testing.assert_allclose(inside, expected, rtol=1e-4, atol=1e-5)
    assert network(images, training=False).shape == (2, 4)


def test_a_patch_that_does_not_divide_the_images_is_refused(config, data):
    model = dataclasses.replace(config.model, patch=3)
    with pytest.raises(ConfigError, match=r"patch must divide the sides of \(8, 8\)"):
        classification(dataclasses.replace(config, model=model), data)


def test_parameter_paths_are_plain(config, data, task):
    params, batch_stats = task.init(0)
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(params)
    }
    assert {"stem/conv/kernel", "stage2_block1/shortcut/kernel", "head/bias"} <= paths
    assert set(batch_stats["stem"]["norm"]) == {"mean", "var"}


@pytest.mark.parametrize("method", METHODS)
def test_a_real_step_of_every_method_lowers_the_loss(
    method, with_method, train_step, data, task
):
    config = with_method(method)
    state = init_state(config, data, task)
    batch = first_batch(config, data)
    losses = []
    for _ in range(6):
        state, metrics = train_step(method)(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert int(state.step) == 6
    assert ("compressed_loss" in metrics) == (method != "none")


def test_equal_seeds_mean_equal_weights_whatever_the_method(with_method, data, task):
    one, other = (
        init_state(with_method(method), data, task) for method in ("none", "cram_plus")
    )
    assert equal(one.params, other.params)
    assert not equal(one.params, task.init(1)[0])


@pytest.mark.parametrize(
    ("options", "dense", "compressed"),
    [
        ({}, slice(None), slice(None)),
        ({"subsample": 4}, slice(None), slice(None, None, 4)),
        ({"batch_share": 0.625}, slice(5), slice(3, None)),
    ],
)
def test_one_step_follows_equation_4(
    options, dense, compressed, with_method, data, task
):
    """Momentum from rest and no decay: the first update is -lr times the sum."""
    config = with_method(
        "cram_plus",
        train_targets=("k50",),
        **options,
        weight_decay=0.0,
        rho=0.0,
        learning_rate=0.5,
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shift=0))
    task = classification(config, data)
    batch = first_batch(config, data)
    params, batch_stats = task.init(config.seed)
    grad = jax.jit(jax.grad(task.loss_fn, has_aux=True))
    magnitudes = np.concatenate(
        [np.abs(leaf).ravel() for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    )
    cut = np.sort(magnitudes)[magnitudes.size // 2]  # floor(size / 2) are pruned
    masks = jax.tree.map(lambda p: (np.abs(p) >= cut) | (p.ndim < 2), params)
    pruned = jax.tree.map(lambda m, p: jnp.where(m, p, 0), masks, params)

    def rows(part):
        return {name: array[part] for name, array in batch.items()}

    expected = jax.tree.map(
        lambda g, c, m: g + jnp.where(m, c, 0),
        grad(params, batch_stats, rows(dense))[0],
        grad(pruned, batch_stats, rows(compressed))[0],
        masks,
    )
    # Warm-up from 0 over one step of ten; so look at the momentum, not the weights.
    state, _ = make_train_step(config, data, task)(
        init_state(config, data, task), batch
    )
    trace = state.opt_state[2][0].trace
    for ours, theirs in zip(
        jax.tree.leaves(trace), jax.tree.leaves(expected), strict=True
    ):
        # float32: two compilations of the same gradient.
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["none", "cram_plus"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    method, with_method, train_step, data, task, progress, tmp_path
):
    config, step = with_method(method), train_step(method)
    whole = train(config, tmp_path / "whole", data, task, progress, train_step=step)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text()

    # As if it had stopped some steps into the second of two epochs.
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "10")
    resumed = train(
        config, tmp_path / "part", data, task, progress, train_step=step, resume=True
    )
    assert equal(whole, resumed)
    assert (tmp_path / "part" / "metrics.jsonl").read_text() == lines


def test_a_run_leaves_everything_about_it(
    with_method, train_step, data, task, progress, tmp_path
):
    config, run = with_method("none"), tmp_path / "run"
    options = {"train_step": train_step("none"), "loggers": ("tensorboard",)}
    train(config, run, data, task, progress, **options)
    assert load_config(run) == config
    text = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 5, 6, 9, 10]
    assert [line["step"] for line in lines if "eval_loss" in line] == [5, 10]
    assert list(run.glob("events.out.tfevents.*"))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"5", "10"}


def test_one_compiled_step_serves_every_seed(with_method, train_step, data, task):
    config, step = with_method("cram_plus"), train_step("cram_plus")
    sizes = []
    for seed in (0, 1, 2):
        this = dataclasses.replace(config, seed=seed)
        step(init_state(this, data, task), first_batch(config, data))
        sizes.append(step._cache_size())
    assert sizes[0] == sizes[-1]


def test_a_run_directory_is_not_overwritten(
    with_method, train_step, data, task, progress, tmp_path
):
    config, step, run = with_method("none"), train_step("none"), tmp_path / "run"
    train(config, run, data, task, progress, train_step=step)
    with pytest.raises(RunError, match="is not empty: choose another --run"):
        train(config, run, data, task, progress)
    changed = dataclasses.replace(config, seed=7)
    with pytest.raises(RunError, match="started with a different seed"):
        train(changed, run, data, task, progress, resume=True)
    state = train(changed, run, data, task, progress, train_step=step, overwrite=True)
    assert int(state.step) == total_steps(config, data)
    with pytest.raises(RunError, match="is not a run"):
        train(config, tmp_path / "none", data, task, progress, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3}, "accumulate must divide the 8 examples"),
        ({"frozen": "nothing"}, "frozen must match some parameters"),
        ({"rule": "rigl", "train_targets": ("2:4",)}, "train_targets must be a share"),
    ],
)
def test_options_that_do_not_fit_cost_no_earlier_run(
    changes, message, config, data, task, progress, tmp_path
):
    save_config(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    optimizer = dataclasses.replace(config.optimizer, **changes)
    wrong = dataclasses.replace(config, optimizer=optimizer)
    with pytest.raises(ConfigError, match=message):
        train(wrong, tmp_path, data, task, progress, overwrite=True)
    few = data._replace(train=Examples(data.train.take(range(5))))
    with pytest.raises(ConfigError, match="batch_size=8 is more than the 5 examples"):
        train(config, tmp_path, few, task, progress, overwrite=True)
    assert load_config(tmp_path) == config
    assert (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["init_from", "teacher"])
def test_a_run_does_not_remove_what_it_comes_from(
    name, config, data, task, progress, tmp_path, monkeypatch
):
    params, batch_stats = task.init(0)
    for run in (tmp_path, tmp_path / "compressed" / "k50"):
        save_model(run, config, params, batch_stats)
    monkeypatch.chdir(tmp_path)
    for place in (".", "compressed/k50"):
        wrong = dataclasses.replace(config, **{name: place})
        with pytest.raises(ConfigError, match=f"{name} must be outside of"):
            train(wrong, tmp_path, data, task, progress, overwrite=True)
    assert (tmp_path / "model").exists()


def test_a_directory_of_something_else_is_left_alone(
    config, data, task, progress, tmp_path
):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="is not a run"):
        train(config, tmp_path, data, task, progress, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    with_method, data, task, progress, tmp_path
):
    config = with_method("none", learning_rate=1e30, warmup=0.0)
    with pytest.raises(NonFiniteLoss, match=r"the loss is \w+ at step [2-9]"):
        train(config, tmp_path / "run", data, task, progress)
