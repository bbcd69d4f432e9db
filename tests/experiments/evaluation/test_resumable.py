"""An evaluation that is stopped half way."""

import json

import jax.numpy as jnp
import pytest

from experiments.errors import RunError
from experiments.evaluation.evaluation import Accuracy
from experiments.evaluation.results import digest
from experiments.evaluation.resumable import forget, resumable

ACCURACIES = {
    "dense": Accuracy("dense", 90.125, None, metrics={"f1": 90.125, "exact": 0.1}),
    "k50": Accuracy("k50", 1 / 3, 85.5, (85.0, 86.0), {"accuracy": 1 / 3}),
    "k90": Accuracy("k90", 10.0, 80.0, (80.0,)),
}


class Recorder:
    """Evaluates, notes what, and is stopped by Ctrl-C before one target."""

    def __init__(self, stop=None):
        self.stop = stop
        self.evaluated = []

    def __call__(self, name):
        if name == self.stop:
            raise KeyboardInterrupt
        self.evaluated.append(name)
        return ACCURACIES[name]


@pytest.fixture
def file(tmp_path):
    """What an evaluation leaves that was stopped before its last target."""
    path = tmp_path / "run" / "evaluation.part.json"
    recorder = Recorder(stop="k90")
    with pytest.raises(KeyboardInterrupt):
        list(resumable(path, {"model": "a"}, list(ACCURACIES), recorder))
    assert recorder.evaluated == ["dense", "k50"]
    return path


def test_what_is_done_is_not_done_again(file):
    recorder = Recorder()
    found = list(resumable(file, {"model": "a"}, list(ACCURACIES), recorder))
    assert recorder.evaluated == ["k90"]
    assert [accuracy for accuracy, _ in found] == list(ACCURACIES.values())
    assert all(seconds >= 0 for _, seconds in found)


def test_seconds_are_those_of_the_evaluation(file):
    stored = json.loads(file.read_text())
    stored["entries"][0]["targets"]["dense"]["seconds"] = 7.5
    file.write_text(json.dumps(stored))
    ((_, seconds),) = resumable(file, {"model": "a"}, ["dense"], Recorder())
    assert seconds == 7.5


def test_other_targets_may_be_asked_for(file):
    recorder = Recorder()
    found = list(resumable(file, {"model": "a"}, ["k90", "dense"], recorder))
    assert recorder.evaluated == ["k90"]
    assert [accuracy.target for accuracy, _ in found] == ["k90", "dense"]


def test_results_of_another_model_do_not_count(file):
    recorder = Recorder()
    list(resumable(file, {"model": "b"}, ["dense"], recorder))
    assert recorder.evaluated == ["dense"]


def test_what_was_asked_for_in_between_loses_nothing(file):
    list(resumable(file, {"model": "b"}, ["dense"], Recorder()))
    forget(file, {"model": "b"}, ["dense"])
    list(resumable(file, {"model": "a"}, ["k90"], Recorder()))
    forget(file, {"model": "a"}, ["k90"])
    recorder = Recorder()
    list(resumable(file, {"model": "a"}, list(ACCURACIES), recorder))
    assert recorder.evaluated == ["k90"]
    forget(file, {"model": "a"}, list(ACCURACIES))
    assert not file.exists()


def test_a_damaged_file_is_named(file):
    file.write_text("{")
    with pytest.raises(RunError, match="evaluation.part.json: .*; remove it to start"):
        next(resumable(file, {"model": "a"}, ["dense"], Recorder()))


def test_a_digest_tells_models_apart():
    model = {"b": jnp.arange(3.0), "w": jnp.ones((2, 3)).T}
    same = {"b": jnp.arange(3.0), "w": jnp.ones((3, 2))}
    assert digest(model) == digest(same)
    assert digest(model) != digest({**model, "b": jnp.array([0.0, 1.0, 2.0000002])})
