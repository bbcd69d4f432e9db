"""Runs that start from trained weights."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.batches import Examples
from experiments.config import OptimizerConfig
from experiments.errors import ConfigError, RunError, WeightsError
from experiments.evaluation.evaluation import make_evaluation
from experiments.images.config import ImageConfig
from experiments.images.task import classification
from experiments.runs import checkpoints
from experiments.runs.directory import save_config
from experiments.training.loop import train
from experiments.training.step import init_state
from experiments.training.warm_start import initial_model

pytestmark = pytest.mark.usefixtures("quick_compilation")


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def source(config, task, tmp_path_factory):
    """The directory of a model: the initial one of another seed, stored."""
    run = tmp_path_factory.mktemp("runs") / "source"
    checkpoints.save_model(run, config, *task.init(5))
    return run


@pytest.fixture
def finetuning(source, with_method):
    """Changes a configuration to start from the source."""

    def change(method="none", **changes):
        config = with_method(method, warmup=0.0)
        return dataclasses.replace(config, init_from=str(source), **changes)

    return change


def test_a_run_starts_from_the_model_of_another(finetuning, data, task):
    config = finetuning()
    state = init_state(config, data, task, initial_model(config, task))
    assert_equal((state.params, state.batch_stats), task.init(5))


def test_a_run_starts_from_the_last_checkpoint_of_another(
    with_method, train_step, finetuning, data, task, progress, tmp_path
):
    run = tmp_path / "run"
    step = train_step("cram_plus")
    state = train(with_method("cram_plus"), run, data, task, progress, train_step=step)
    # Its optimiser is another, so that its state has another structure.
    config = dataclasses.replace(finetuning("none"), init_from=str(run))
    model = initial_model(config, task)
    assert_equal(model, (state.params, state.batch_stats))


def test_a_finetuned_run_resumes_exactly_and_needs_its_source_no_more(
    finetuning, data, task, progress, tmp_path, source
):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    config = dataclasses.replace(finetuning("none"), init_from=str(copy))
    whole = train(config, tmp_path / "whole", data, task, progress)
    shutil.rmtree(copy)

    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "10")
    resumed = train(config, tmp_path / "part", data, task, progress, resume=True)
    assert_equal(whole.params, resumed.params)
    assert_equal(whole.batch_stats, resumed.batch_stats)
    other = dataclasses.replace(config, init_from=str(source))
    with pytest.raises(RunError, match="started with a different init_from"):
        train(other, tmp_path / "part", data, task, progress, resume=True)


def test_the_masks_of_a_compressed_model_stay_through_a_resumed_transfer(
    finetuning, data, task, progress, tmp_path, config
):
    """Four classes become three: a new head, and the zeros of all other layers."""
    params, batch_stats = task.init(5)
    compressed, masks = make_evaluation(config, data, task).compress(params, "k50")
    source = tmp_path / "compressed"
    checkpoints.save_model(source, config, compressed, batch_stats)

    def of_three(examples):
        arrays = examples.arrays
        return Examples({**arrays, "label": arrays["label"] % 3})

    few = data._replace(
        classes=3, train=of_three(data.train), evaluation=of_three(data.evaluation)
    )
    config = finetuning("none", new_head=True)
    config = dataclasses.replace(
        config,
        init_from=str(source),
        optimizer=dataclasses.replace(config.optimizer, keep_pruned=True),
    )
    task = classification(config, few)
    whole = train(config, tmp_path / "whole", few, task, progress)
    assert whole.params["head"]["kernel"].shape[-1] == 3
    body = {name: tree for name, tree in masks.items() if name != "head"}
    for name, tree in body.items():
        zeros = jax.tree.map(lambda leaf: leaf != 0, whole.params[name])
        kernels = [
            (kept, mask)
            for kept, mask in zip(
                jax.tree.leaves(zeros), jax.tree.leaves(tree), strict=True
            )
            if mask.ndim > 1
        ]
        for kept, mask in kernels:
            np.testing.assert_array_equal(kept, mask)
    before = compressed["stage1_block1"]["conv1"]["kernel"]
    after = whole.params["stage1_block1"]["conv1"]["kernel"]
    assert not np.array_equal(before, after)

    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "10")
    resumed = train(config, tmp_path / "whole", few, task, progress, resume=True)
    assert_equal(whole.params, resumed.params)


def test_another_number_of_classes_is_named(finetuning, data):
    config = finetuning("none")
    task = classification(config, data._replace(classes=7))
    message = (
        r"does not fit resnet here: head/bias is \(4,\) there and \(7,\) here, and 1 "
        r"more differ; --new-head draws a new"
    )
    with pytest.raises(WeightsError, match=message):
        initial_model(config, task)


def test_another_network_is_named_and_the_directory_not_claimed(
    finetuning, data, tmp_path, progress
):
    config = finetuning("none")
    model = dataclasses.replace(config.model, widths=(4, 8, 8), blocks=(1, 1, 1))
    config = dataclasses.replace(config, model=model)
    task = classification(config, data)
    with pytest.raises(WeightsError, match="is missing there"):
        train(config, tmp_path / "run", data, task, progress)
    assert not (tmp_path / "run").exists()


def test_a_damaged_source_is_named(source, tmp_path):
    shutil.copytree(source, tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged" / "model" / "d", ignore_errors=True)
    (tmp_path / "damaged" / "model" / "_METADATA").write_text("{")
    with pytest.raises(RunError, match="cannot read .*damaged/model"):
        checkpoints.read_model(tmp_path / "damaged")


def test_a_run_without_checkpoints_is_named(config, tmp_path):
    save_config(tmp_path, config)
    with pytest.raises(RunError, match="holds no checkpoint"):
        checkpoints.read_model(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "starts from trained weights: name a run's directory or a file"),
        (
            "weights.bin",
            "must be a run's directory or a file of torch",
        ),
    ],
)
def test_a_source_that_cannot_be_one_is_refused(source, message, finetuning, task):
    config = dataclasses.replace(finetuning(), init_from=source)
    with pytest.raises(ConfigError, match=message):
        initial_model(config, task)


def test_a_new_head_needs_a_layer_of_that_name(finetuning, task):
    config = dataclasses.replace(finetuning(), new_head=True)
    other = task._replace(head=("logits",))
    with pytest.raises(ConfigError, match="a last layer called 'logits'; resnet has"):
        initial_model(config, other)


def test_masks_without_a_compressed_model_are_refused():
    with pytest.raises(ConfigError, match="keep_pruned needs init_from"):
        ImageConfig(optimizer=OptimizerConfig(keep_pruned=True))


def test_recipes_that_start_from_weights_ask_for_them_first(tmp_path, capsys):
    assert main(f"train cifar10_finetune --data-dir {tmp_path}".split()) == 1
    assert "with --init-from" in capsys.readouterr().err
