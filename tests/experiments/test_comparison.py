"""The comparison of methods, on the small data of these tests."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import comparison
from experiments.batches import Examples
from experiments.comparison import Bench, chosen_value, compare
from experiments.errors import ConfigError, NonFiniteLoss, RunError, Stopped
from experiments.evaluation.results import load_results
from experiments.methods.bench import (
    METHODS,
    check_methods,
    configured,
    tried_values,
)
from experiments.methods.config import PruningConfig
from experiments.recipes import RECIPES
from experiments.reports import comparison as comparison_report
from experiments.runs.directory import read_status, save_config, write_status
from experiments.runs.metrics import make_console
from experiments.runs.stored_config import to_dict
from experiments.verbs.compare import Compare

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("dense", "k50", "2:4")


def test_every_method_has_a_run_for_each_of_its_targets(config):
    """Two of three evaluations of a step buy half of the epochs."""
    for name, entry in METHODS.items():
        assert len(entry.values) == 3, name
        found = comparison.trained_targets(entry, (*NAMES, "4bit"))
        assert found == {
            frozenset(): (None,),
            frozenset({"global", "layer"}): ("k50",),
        }.get(entry.forms, ("k50", "2:4", "4bit")[: 2 + ("quantised" in entry.forms)])
        for target in found:
            value = tried_values(entry, config)[0]
            run = configured(config, entry, target, NAMES, budget=8, value=value)
            assert run.epochs * entry.evaluations == 8
            assert run.eval_targets == (NAMES if target is None else (target,))
    run = configured(
        config, METHODS["cram_plus"], None, NAMES, budget=8, value=0.3
    ).optimizer
    assert (run.rho, run.train_targets) == (0.3, ("k50", "2:4"))


def test_a_comparison_goes_on_where_it_was_stopped(
    config, data, task, tmp_path, monkeypatch
):
    tried = []

    def prepare(base, data_dir):
        tried.append(base.data.validation)
        return data, task

    class Stop(Exception):
        pass

    def stop_after(count):
        kept, saved = comparison.save_results, []

        def save(results, path, **options):
            kept(results, path, **options)
            saved.append(path)
            if len(saved) == count:
                raise Stop

        return save

    def resume():
        return compare(bench, ("sgd", "gradual"), 1, tmp_path, make_console(quiet=True))

    monkeypatch.setattr(comparison, "prepare", prepare)
    for name in ("sgd", "gradual"):  # one value to try, which saves compilations
        entry = METHODS[name]
        monkeypatch.setitem(METHODS, name, entry._replace(values=entry.values[1:2]))
    every = dataclasses.replace(config.optimizer, pruning=PruningConfig(every=2))
    base = dataclasses.replace(config, optimizer=every)
    bench = Bench(base, ("dense", "k50"), budget=1, held_out=5, tuned_on="k50")
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "save_results", stop_after(1))
        with pytest.raises(Stop):
            resume()
    assert tried == [5]
    half = load_results(tmp_path / "comparison.json")
    results = resume()
    assert set(tried) == {0, 5}

    sgd, gradual = results["methods"]["sgd"], results["methods"]["gradual"]
    assert sgd["search"] == half["methods"]["sgd"]["search"]
    assert [found["value"] for found in gradual["search"]] == [0.75]
    assert [run["trained_for"] for run in sgd["runs"]] == [None]
    assert [run["trained_for"] for run in gradual["runs"]] == ["k50"]
    assert gradual["runs"][0]["zeros"] == pytest.approx(0.5, abs=0.01)
    assert sgd["runs"][0]["zeros"] < 0.01
    assert sgd["cost"]["state"] == pytest.approx(1, abs=0.02)
    assert gradual["cost"]["state"] == pytest.approx(1.25, abs=0.02)  # bool masks
    assert not any((tmp_path / "runs").iterdir())

    comparison_report.store(results, tmp_path, "title")
    _, _, header, _, *rows = (tmp_path / "comparison.md").read_text().splitlines()
    assert header.startswith("| method | dense | 50 % | networks |")
    assert [row.split(" | ")[0] for row in rows[:2]] == ["| SGD", "| gradual"]
    assert rows[1].split(" | ")[1] == ""  # it trains no network for dense
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    assert json.dumps(resume()["methods"]) == json.dumps(results["methods"])
    bench = bench._replace(budget=4)
    with pytest.raises(ConfigError, match="holds another comparison"):
        resume()


def test_the_time_of_a_training_that_was_stopped_is_all_of_it(
    config, data, task, tmp_path, monkeypatch
):
    def stopped(*arguments, **options):
        comparison_train(*arguments, max_steps=2, **options)
        raise Stopped("in the middle", 15)

    def stopped_evaluation(*arguments):
        raise KeyboardInterrupt

    def compared():
        return compare(bench, ("sgd",), 1, tmp_path, make_console(quiet=True))

    comparison_train = comparison.train
    monkeypatch.setattr(comparison, "prepare", lambda base, data_dir: (data, task))
    bench = Bench(config, ("dense",), budget=1, held_out=0, tuned_on="k50")
    for name, function, error in (
        ("train", stopped, Stopped),
        ("evaluate_target", stopped_evaluation, KeyboardInterrupt),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(comparison, name, function)
            with pytest.raises(error):
                compared()
        (run,) = (tmp_path / "runs").iterdir()
        before = read_status(run)["cpu_seconds"]
        assert before > 0
        write_status(run, cpu_seconds=before + 1000)
    (entry,) = compared()["methods"]["sgd"]["runs"]
    assert entry["seconds"] >= 2000

    fewer = data._replace(train=Examples(data.train.take(range(32))))
    monkeypatch.setattr(comparison, "prepare", lambda base, data_dir: (fewer, task))
    with pytest.raises(ConfigError, match="runs on 40 training examples, and .* 32"):
        compare(bench, ("sgd",), 2, tmp_path, make_console(quiet=True))


def test_a_method_that_diverges_is_noted_and_not_tried_again(
    config, data, task, tmp_path, monkeypatch
):
    def run(self, entry, target, value, seed, word):
        raise NonFiniteLoss("the loss is nan at step 3")

    monkeypatch.setattr(comparison, "prepare", lambda base, data_dir: (data, task))
    monkeypatch.setattr(comparison._Runner, "run", run)
    monkeypatch.setattr(comparison._Runner, "cost", lambda self, entry, config: {})
    bench = Bench(config, ("dense", "k50"), budget=1, held_out=5, tuned_on="k50")
    console = make_console(quiet=True)
    results = compare(bench, ("gradual",), 1, tmp_path, console)
    own = results["methods"]["gradual"]
    assert [found["score"] for found in own["search"]] == [0.0] * 3
    assert own["diverged"] == [{"trained_for": "k50", "seed": 0}]
    page = comparison_report.page(results, "title")
    assert "- gradual diverged for k50, seed 0" in page
    again = compare(bench, ("gradual",), 1, tmp_path, console)
    assert again["methods"] == results["methods"]


def test_processes_with_other_methods_share_the_results(
    config, data, task, tmp_path, monkeypatch
):
    """The second begins and ends while the first is at work; neither loses a run."""
    console = make_console(quiet=True)
    bench = Bench(config, ("dense", "k50"), budget=1, held_out=0, tuned_on="k50")
    runs = []

    def run(self, entry, target, value, seed, word):
        runs.append(word)
        if runs == ["sgd"]:
            compare(bench, ("gradual",), 1, tmp_path, console)
        return comparison.Trained([], 0.0, 1.0)

    monkeypatch.setattr(comparison, "prepare", lambda base, data_dir: (data, task))
    monkeypatch.setattr(comparison._Runner, "run", run)
    monkeypatch.setattr(comparison._Runner, "cost", lambda self, entry, config: {})
    results = compare(bench, ("sgd", "sam"), 1, tmp_path, console)
    assert runs == ["sgd", "gradual", "sam"]
    found = {name: len(own["runs"]) for name, own in results["methods"].items()}
    assert found == {"sgd": 1, "sam": 1, "gradual": 1}
    stored = load_results(tmp_path / "comparison.json")
    assert json.dumps(stored, sort_keys=True) == json.dumps(results, sort_keys=True)


def test_without_a_search_a_knob_has_the_value_of_the_recipe():
    text = RECIPES["sst2_small"]
    for name, expected in {
        "cram_plus": text.optimizer.rho,
        "sam": RECIPES["sst2_small_sam"].optimizer.rho,
        "ste": text.optimizer.learning_rate,
        "sgd": text.optimizer.weight_decay,
        "gradual": 0.75,  # a share of the steps suits every task
    }.items():
        assert chosen_value(METHODS[name], [], text) == expected, name
    entry = METHODS["gradual"]
    search = [{"value": 0.9, "score": 80.0}, {"value": 0.5, "score": 90.0}]
    assert chosen_value(entry, search, text) == 0.5


def test_values_that_depend_on_the_task_are_multiples_of_the_recipes():
    image, digits = RECIPES["cifar10_small"], RECIPES["digits"]
    for name, on_image, on_digits in (
        ("cram_plus", (0.075, 0.15, 0.3), (0.2, 0.4, 0.8)),
        ("sam", (0.05, 0.1, 0.2), (0.1, 0.2, 0.4)),
        ("ste", (0.025, 0.05, 0.1), (0.1, 0.2, 0.4)),
        ("gradual", (0.5, 0.75, 0.9), (0.5, 0.75, 0.9)),
    ):
        assert tried_values(METHODS[name], image) == pytest.approx(on_image), name
        assert tried_values(METHODS[name], digits) == pytest.approx(on_digits), name
    assert str(tried_values(METHODS["acdc"], image)) == "(20, 40, 80)"  # of steps


def test_methods_can_start_from_a_run(tmp_path):
    """They have its network and data, and tune on the images that it left out."""
    theirs = RECIPES["digits_channels"]
    theirs = dataclasses.replace(
        theirs, data=dataclasses.replace(theirs.data, validation=200)
    )
    run = tmp_path / "dense"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_dict(theirs)))
    verb = Compare(init_from=run, learning_rate=0.05)
    verb.check()
    base = verb._base()
    assert (base.model, base.init_from) == (theirs.model, str(run))
    assert base.optimizer.learning_rate == 0.05
    assert base.optimizer.rule == "cram_plus"
    assert verb._held_out(base) == 200
    assert dataclasses.replace(verb, held_out=90)._held_out(base) == 90
    assert dataclasses.replace(verb, tune=False)._held_out(base) == 0
    assert Compare(task="sst2_small")._held_out(RECIPES["sst2_small"]) == 1000
    with pytest.raises(ConfigError, match="held_out must be at least 0, got -1"):
        dataclasses.replace(verb, held_out=-1).check()

    stored = Bench(base, NAMES, 8, 200, "k50").stored()
    assert (stored["init_from"], stored["learning_rate"]) == (str(run), 0.05)
    assert Bench(RECIPES["digits"], NAMES, 8, 200, "k50").stored().keys() == (
        stored.keys() - {"init_from", "learning_rate"}
    )
    with pytest.raises(ConfigError, match="init_from must be a run on text, got"):
        Compare(task="sst2_small", init_from=run).check()
    with pytest.raises(RunError, match="is not a run"):
        Compare(init_from=tmp_path).check()


def test_methods_can_start_from_a_run_on_data_of_ones_own(tmp_path):
    files = {
        "train_file": str(tmp_path / "a.csv"),
        "eval_file": str(tmp_path / "b.csv"),
    }
    for file in files.values():
        Path(file).write_text("text,label\nwell,good\nill,bad\n")
    run = tmp_path / "run"
    (run / "vocabulary").mkdir(parents=True)
    theirs = dataclasses.replace(RECIPES["own_texts"], weights=None, **files)
    verb = Compare(task="own_texts", init_from=run)
    save_config(run, theirs)
    verb.check()
    base = verb._base()
    assert {name: getattr(base, name) for name in files} == files
    assert base.vocabulary == str(run / "vocabulary")
    # All training examples are trained on: those held out of them are no test.
    held = dataclasses.replace(theirs.data, validation=1)
    save_config(run, dataclasses.replace(theirs, data=held, eval_file=None))
    with pytest.raises(ConfigError, match="init_from must be a run with test examples"):
        verb.check()
    for name in ("own_texts", "own_images"):
        with pytest.raises(ConfigError, match="name a run on them with --init-from"):
            Compare(task=name).check()


def test_another_bert_is_another_comparison():
    base = RECIPES["sst2_small"]
    stored = [
        Bench(dataclasses.replace(base, weights=name), NAMES, 8, 0, "k50").stored()
        for name in ("a", "b")
    ]
    assert stored[0] != stored[1]


def test_what_is_wrong_is_said_before_jax():
    for verb, message in (
        (Compare(methods=("magic",)), "methods must be of sgd, sam"),
        (Compare(methods=("sgd", "sgd")), "methods must be some, each once"),
        (Compare(task="digit"), "no recipe is called 'digit'"),
        (Compare(targets=("half",)), "target 'half' is unknown"),
        (Compare(seeds=0), "seeds must be at least 1, got 0"),
        (Compare(task="sst2_small"), "sst2_small starts from trained weights"),
        (Compare(weights="bert"), "weights are for tasks on text, got 'digits'"),
        (Compare(budget=0), "budget must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            verb.check()
    Compare().check()
    check_methods(tuple(METHODS))
