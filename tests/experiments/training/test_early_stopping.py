"""Runs that stop when they get no better, and keep their best model."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.errors import DataError
from experiments.evaluation.open_run import stored_data_dir
from experiments.runs import checkpoints
from experiments.runs.directory import load_config, read_status, state_of
from experiments.training.loop import train
from experiments.training.step import init_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

# By number of evaluation: the second is the best, and then the fifth would be.
SCORES = [40.0, 60.0, 50.0, 60.0, 70.0, 80.0]


@pytest.fixture
def setting(with_method, data, task, train_step):
    """Six evaluations in two epochs of five steps, with scores of our choice."""
    config = dataclasses.replace(
        with_method("none"), evaluate_every=0.4, checkpoint_every=0, patience=2
    )

    def make(scores=SCORES):
        scores = iter(scores)
        judged = []

        def evaluate(params, batch_stats, images):
            judged.append(jax.tree.map(np.asarray, params))
            return {"accuracy": next(scores), "loss": 0.0}

        return task._replace(evaluate=evaluate), judged

    return config, data, make, train_step("none")


def stored_model(run, config, data, task):
    return checkpoints.load_model(run, init_state(config, data, task))


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_stops_after_its_patience_and_keeps_the_best(setting, progress, tmp_path):
    config, data, make, step = setting
    task, judged = make()
    run = tmp_path / "run"
    state = train(config, run, data, task, progress, train_step=step)
    # Evaluated every second step; 50 and 60 are no better than 60.
    assert len(judged) == 4
    assert int(state.step) == 8
    assert checkpoints.latest_step(run) == 8
    params, _ = stored_model(run, config, data, task)
    equal(params, judged[1])
    equal(checkpoints.read_model(run)[0], judged[1])

    again, judged = make()
    state = train(config, run, data, again, progress, train_step=step, resume=True)
    assert int(state.step) == 8
    assert judged == []


def test_more_patience_resumes_a_run_that_has_stopped(setting, progress, tmp_path):
    config, data, make, step = setting
    task, judged = make()
    run = tmp_path / "run"
    train(config, run, data, task, progress, train_step=step)
    config = dataclasses.replace(config, patience=3)
    state = train(config, run, data, task, progress, train_step=step, resume=True)
    assert int(state.step) == 10
    assert len(judged) == 5
    equal(stored_model(run, config, data, task)[0], judged[4])


def test_without_patience_the_last_model_counts(setting, progress, tmp_path):
    config, data, make, step = setting
    config = dataclasses.replace(config, patience=0)
    task, judged = make([40.0, 60.0, 50.0, 60.0, 55.0])
    notes = {"data_dir": "/where/images/are"}
    state = train(config, tmp_path, data, task, progress, train_step=step, notes=notes)
    assert int(state.step) == 10
    assert not (tmp_path / "model").exists()
    equal(stored_model(tmp_path, config, data, task)[0], judged[-1])
    # The best one is a run of its own.
    assert load_config(tmp_path / "best") == config
    equal(stored_model(tmp_path / "best", config, data, task)[0], judged[1])
    assert stored_data_dir(tmp_path / "best") == Path("/where/images/are")
    # What is evaluated now is not reported of a better model that comes later.
    assert read_status(tmp_path / "best")["step"] == 4


def test_a_run_that_is_judged_at_its_end_alone_has_no_best(setting, progress, tmp_path):
    config, data, make, step = setting
    config = dataclasses.replace(config, patience=0, evaluate_every=0)
    task, judged = make()
    train(config, tmp_path, data, task, progress, train_step=step)
    assert len(judged) == 1
    assert not (tmp_path / "best").exists()


def test_a_resumed_run_stops_where_the_other_did(setting, progress, tmp_path):
    config, data, make, step = setting
    config = dataclasses.replace(config, checkpoint_every=1)
    whole, part = tmp_path / "whole", tmp_path / "part"
    task, judged = make()
    train(config, whole, data, task, progress, train_step=step)
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "8")  # it goes on from step 5

    later, rejudged = make()
    later.evaluate(None, None, None), later.evaluate(None, None, None)
    rejudged.clear()
    state = train(config, part, data, later, progress, train_step=step, resume=True)
    assert int(state.step) == 8
    assert len(rejudged) == 2
    equal(rejudged[-1], judged[-1])
    lines = [(run / "metrics.jsonl").read_text() for run in (whole, part)]
    assert lines[0] == lines[1]
    equal(*(stored_model(run, config, data, task)[0] for run in (whole, part)))


@pytest.mark.parametrize("at", [4, 10])
def test_an_evaluation_that_fails_loses_no_training(at, setting, progress, tmp_path):
    """At the end, or between two lines of metrics."""
    config, data, make, step = setting
    whole, part = tmp_path / "whole", tmp_path / "part"
    scores = [40.0, 50.0, 60.0, 50.0, 70.0]
    task, judged = make(scores)
    train(config, whole, data, task, progress, train_step=step)

    before = at // 2 - 1
    evaluated, _ = make(scores[:before])

    def unreadable(*arguments):
        try:
            return evaluated.evaluate(*arguments)
        except StopIteration:
            raise DataError("an image cannot be read") from None

    failing = task._replace(evaluate=unreadable)
    with pytest.raises(DataError, match="cannot be read"):
        train(config, part, data, failing, progress, train_step=step)
    assert checkpoints.latest_step(part) == at
    assert f"its last checkpoint is at step {at} of 10" in state_of(part)

    mended, rejudged = make(scores[before:])
    for _ in range(2):  # what is finished is not evaluated again
        train(config, part, data, mended, progress, train_step=step, resume=True)
    assert len(rejudged) == 5 - before
    for one, other in zip(rejudged, judged[before:], strict=True):
        equal(one, other)
    lines = [(run / "metrics.jsonl").read_text() for run in (whole, part)]
    assert lines[0] == lines[1]
    equal(*(stored_model(run, config, data, task)[0] for run in (whole, part)))
    assert state_of(part) == ""
