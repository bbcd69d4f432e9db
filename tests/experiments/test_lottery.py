"""Lottery tickets from the command, on the small data of these tests."""

import dataclasses
import json
import shutil
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
import references

from cram_jax import prunable
from experiments.commands import lottery as command
from experiments.commands.lottery import Plan, lottery
from experiments.errors import ConfigError, RunError
from experiments.runs import checkpoints
from experiments.training.loop import train
from experiments.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Found(NamedTuple):
    """What a lottery left, and the states that its rounds began with."""

    folder: object
    begun: dict


@pytest.fixture(scope="module")
def shared(data, task, with_method):
    """The lottery with its two programs compiled once."""
    programs = {}

    def compiled(config, **others):
        key = config.optimizer.keep_pruned
        if key not in programs:
            programs[key] = make_train_step(config, **others)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "prepare", lambda config, data_dir: (data, task))
        patch.setattr(command, "make_train_step", compiled)
        yield with_method("sam"), compiled


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
    """Two rounds that each leave half, rewound to step 3 of 10, never stopped."""
    folder, begun = tmp_path_factory.mktemp("whole"), {}
    begin = command._begin

    def note(run, config, state):
        begun[run.name] = jax.tree.map(np.asarray, state._replace(key=()))
        begin(run, config, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_begin", note)
        lottery(shared[0], Plan(2, 0.5, 3, "global"), folder, None)
    return Found(folder, begun)


def kernels(params, where=()):
    leaves = zip(jax.tree.leaves(params), prunable(params, *where), strict=True)
    return [np.asarray(leaf) for leaf, is_chosen in leaves if is_chosen]


def test_a_round_begins_with_the_early_state_under_its_masks(
    whole, shared, data, task, tmp_path, progress
):
    config, compiled = shared
    step = compiled(config)
    plain = train(config, tmp_path, data, task, progress, train_step=step, max_steps=3)
    early = whole.begun["early"]
    jax.tree.map(np.testing.assert_array_equal, early.params, plain.params)
    assert sorted(whole.begun) == ["early", "round1", "round2"]
    for number in (1, 2):
        before, _ = checkpoints.read_model(whole.folder / f"round{number - 1}")
        size = sum(kernel.size for kernel in kernels(before))
        removed = int((1 - 0.5**number) * size)
        masks = references.keep_largest(kernels(before), size - removed)
        state = whole.begun[f"round{number}"]
        assert state.step == 3
        for got, start, mask in zip(
            kernels(state.params), kernels(early.params), masks, strict=True
        ):
            np.testing.assert_array_equal(got, start * mask)
        jax.tree.map(
            np.testing.assert_array_equal, state.batch_stats, early.batch_stats
        )
        momentum = (optax.tree.get(s.opt_state, "trace") for s in (state, early))
        jax.tree.map(np.testing.assert_array_equal, *momentum)


def test_masks_are_nested_and_pruned_weights_stay_zero(whole):
    masks = []
    for number in (1, 2):
        trained, _ = checkpoints.read_model(whole.folder / f"round{number}")
        masks.append([kernel != 0 for kernel in kernels(trained)])
        begun = kernels(whole.begun[f"round{number}"].params)
        for mask, start in zip(masks[-1], begun, strict=True):
            np.testing.assert_array_equal(mask, start != 0)
    for larger, smaller in zip(*masks, strict=True):
        assert not (smaller & ~larger).any()
    stored = json.loads((whole.folder / "lottery.json").read_text())
    size = sum(mask.size for mask in masks[0])
    for found, mask in zip(stored["rounds"][1:], masks, strict=True):
        assert found["zeros"] == 1 - sum(m.sum() for m in mask) / size


def test_a_lottery_that_was_stopped_ends_with_the_same_bits(
    whole, shared, tmp_path, monkeypatch
):
    class Stop(Exception):
        pass

    def stopped(config, run, *others, **options):
        if run.name == "round1":
            options["max_steps"] = 6
        train(config, run, *others, **options)
        if run.name == "round1":
            raise Stop

    config, _ = shared
    with monkeypatch.context() as patch:
        patch.setattr(command, "train", stopped)
        with pytest.raises(Stop):
            lottery(config, Plan(1, 0.5, 3, "global"), tmp_path, None)
    lottery(config, Plan(2, 0.5, 3, "global"), tmp_path, None)
    for number in range(3):
        models = (
            checkpoints.read_model(folder / f"round{number}")
            for folder in (whole.folder, tmp_path)
        )
        jax.tree.map(np.testing.assert_array_equal, *models)
    results = [
        json.loads((folder / "lottery.json").read_text())
        for folder in (whole.folder, tmp_path)
    ]
    assert results[0] == results[1]
    for changed, share, named in (
        (config, 0.2, "share is 0.5, expected 0.2"),
        (dataclasses.replace(config, epochs=3), 0.5, "epochs is 2, expected 3"),
    ):
        with pytest.raises(ConfigError, match=f"another lottery, whose {named}; choo"):
            lottery(changed, Plan(2, share, 3, "global"), tmp_path, None)


def test_the_scope_layer_prunes_each_layer_alike(shared, task, tmp_path, monkeypatch):
    begun, begin = {}, command._begin

    def note(run, config, state):
        begun[run.name] = jax.tree.map(np.asarray, state.params)
        begin(run, config, state)

    monkeypatch.setattr(command, "_begin", note)
    lottery(shared[0], Plan(1, 0.5, 3, "layer"), tmp_path, None)
    where = [task.filters.uniform]
    trained, _ = checkpoints.read_model(tmp_path / "round0")
    for kernel, start, got in zip(
        kernels(trained, where),
        kernels(begun["early"], where),
        kernels(begun["round1"], where),
        strict=True,
    ):
        kept = kernel.size - kernel.size // 2
        (mask,) = references.keep_largest([kernel], kept)
        np.testing.assert_array_equal(got, start * mask)
    chosen = prunable(trained, task.filters.uniform)
    leaves = zip(jax.tree.leaves(begun["round1"]), chosen, strict=True)
    assert all((leaf != 0).any() for leaf, is_chosen in leaves if not is_chosen)


def test_an_early_state_that_is_gone_is_not_replaced_by_a_later_one(
    shared, whole, tmp_path
):
    folder = tmp_path / "copy"
    shutil.copytree(whole.folder, folder)
    lottery(shared[0], Plan(2, 0.5, 3, "global"), folder, None)  # under another name
    shutil.rmtree(folder / "early")
    with pytest.raises(RunError, match="round0 is at step 10, expected rewind_step=3"):
        lottery(shared[0], Plan(3, 0.5, 3, "global"), folder, None)
    assert not (folder / "early").exists()


def test_patience_counts_from_the_step_that_rounds_go_back_to(
    shared, data, task, tmp_path, monkeypatch
):
    flat = task._replace(evaluate=lambda *model: {"accuracy": 50.0, "loss": 1.0})
    monkeypatch.setattr(command, "prepare", lambda config, data_dir: (data, flat))
    config = dataclasses.replace(shared[0], patience=1, evaluate_every=0.2)
    lottery(config, Plan(1, 0.5, 3, "global"), tmp_path, None)
    # The first evaluation is the best: after step 1, and in the next round step 4.
    runs = ("early", "round0", "round1")
    steps = {run: checkpoints.latest_step(tmp_path / run) for run in runs}
    assert steps == {"early": 3, "round0": 4, "round1": 5}


def test_a_rewind_step_after_the_end_is_refused(shared, tmp_path):
    with pytest.raises(ConfigError, match="before the last of 10 steps, got 10"):
        lottery(shared[0], Plan(1, 0.5, 10, "layer"), tmp_path, None)
