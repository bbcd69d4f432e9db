import io
import json

import pytest
from rich.console import Console

from experiments.evaluation.evaluation import Accuracy
from experiments.evaluation.results import (
    add_run,
    cell,
    in_order,
    load_results,
    merged,
    new_results,
    save_results,
    summarize,
)
from experiments.images.config import ImageConfig
from experiments.reports.display import accuracy_table, plot_accuracy


@pytest.fixture
def results():
    results = new_results(["dense", "k90", "2:4"])
    for method, shift in (("SGD", 20.0), ("CrAM+", 0.0)):
        for seed in range(3):
            accuracies = [
                Accuracy("dense", 99.0, 99.0),
                Accuracy("k90", 10.0 + seed, 97.0 + seed - shift),
                Accuracy("2:4", 50.0, 98.0 - shift),
            ]
            add_run(results, method, ImageConfig(seed=seed), accuracies, 1.5)
    return results


def test_results_survive_their_file(results, tmp_path):
    path = tmp_path / "deep" / "results.json"
    save_results(results, path)
    assert load_results(path) == json.loads(json.dumps(results))
    assert results["methods"]["SGD"]["runs"][2]["config"]["seed"] == 2
    assert {"jax", "flax", "optax", "python"} <= set(results["versions"])


def test_the_mean_and_the_sample_deviation(results):
    # 97, 98, 99: mean 98, squared deviations 1 + 0 + 1 over 3 - 1.
    assert summarize(results, "CrAM+", "recalibrated", "k90") == (98.0, 1.0)
    assert cell(results, "CrAM+", "recalibrated", "k90") == "98.0 ± 1.0"


def test_one_run_has_no_deviation():
    results = new_results(["dense"])
    add_run(results, "SGD", ImageConfig(), [Accuracy("dense", 98.76, 99.0)], 1.0)
    assert cell(results, "SGD", "pruned", "dense") == "98.8"


def test_the_table_shows_every_figure(results):
    stream = io.StringIO()
    table = accuracy_table(results, "Title")
    Console(file=stream, width=100).print(table)
    text = stream.getvalue()
    assert "Title" in text
    (line,) = [line for line in text.splitlines() if "90 %" in line]
    expected = ["11.0±1.0", "78.0±1.0", "98.0±1.0"]
    assert line.split()[2:] == [expected[0], expected[1], expected[0], expected[2]]


def test_the_plot_is_a_picture(results, tmp_path):
    path = tmp_path / "plot.png"
    plot_accuracy(results, path, "Title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_one_run_has_the_deviation_of_its_draws():
    results = new_results(["k90"])
    drawn = Accuracy("k90", 10.0, 98.0, (97.0, 98.0, 99.0))
    add_run(results, "SGD", ImageConfig(), [drawn], 1.0)
    assert cell(results, "SGD", "recalibrated", "k90") == "98.0 ± 1.0"
    assert cell(results, "SGD", "pruned", "k90") == "10.0"
    # Of two runs it is the deviation over the runs: 96 and 98 are sqrt(2) apart.
    add_run(results, "SGD", ImageConfig(seed=1), [Accuracy("k90", 10.0, 96.0)], 1.0)
    assert cell(results, "SGD", "recalibrated", "k90") == "97.0 ± 1.4"


def test_an_unknown_figure_is_an_empty_cell():
    results = new_results(["dense", "k90"])
    add_run(results, "SGD", ImageConfig(), [Accuracy("dense", 98.0, 99.0)], 1.0)
    assert cell(results, "SGD", "pruned", "k90") == ""
    accuracy_table(results, "Title")


def evaluated(targets, model):
    """Results of one run of a model."""
    results = new_results(list(targets))
    accuracies = [Accuracy(name, value, value) for name, value in targets.items()]
    add_run(results, "SGD", ImageConfig(), accuracies, 1.0, model=model)
    return results


def test_targets_of_one_model_are_kept_and_the_newer_figure_counts():
    both = merged(
        evaluated({"dense": 99.0, "k90": 50.0}, "a"),
        evaluated({"k80": 90.0, "k90": 60.0}, "a"),
    )
    assert sorted(both["targets"]) == ["dense", "k80", "k90"]
    (run,) = both["methods"]["SGD"]["runs"]
    assert run["pruned"] == {"dense": 99.0, "k90": 60.0, "k80": 90.0}
    assert run["seconds"] == 2.0


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        ("dense b50", "c25 c50", "dense b50 c25 c50"),
        ("k90", "dense k90 k95", "dense k90 k95"),
        ("dense k50 k95", "dense k50 k90", "dense k50 k90 k95"),
        ("", "dense k50", "dense k50"),
    ],
)
def test_targets_keep_their_order(names, others, expected):
    assert in_order(names.split(), others.split()) == expected.split()


def test_results_of_different_models_are_not_merged():
    one, other = evaluated({"dense": 99.0}, "a"), evaluated({"k90": 60.0}, "b")
    assert merged(one, other) is None


def test_results_on_different_examples_are_not_merged():
    one, other = evaluated({"dense": 99.0}, "a"), evaluated({"k90": 60.0}, "a")
    other["methods"]["SGD"]["runs"][0]["data"] = "new"
    assert merged(one, other) is not None  # those of earlier versions do not say
    one["methods"]["SGD"]["runs"][0]["data"] = "old"
    assert merged(one, other) is None
