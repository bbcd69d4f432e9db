"""Reports of stored runs."""

import dataclasses

import pytest

from experiments.__main__ import main
from experiments.config import OptimizerConfig, variant
from experiments.errors import RunError
from experiments.evaluation.evaluation import Accuracy
from experiments.evaluation.results import (
    add_run,
    load_results,
    new_results,
    save_results,
)
from experiments.recipes import cifar10, cifar10_ablations, squad
from experiments.reports import paper
from experiments.reports.report import gather, method_label, write_report
from experiments.runs.directory import save_config, write_status

NAMES = ("dense", "k70", "k90", "u50", "u90", "2:4")


@pytest.fixture
def store(tmp_path):
    """Stores a run as training and evaluation leave it, with chosen accuracies."""

    def save(config, seed, accuracies, calibrations=2, *, recalibrates=True):
        config = dataclasses.replace(config, seed=seed)
        run = tmp_path / f"{config.name}-{seed}"
        save_config(run, config)
        results = new_results(list(accuracies))
        rows = [
            Accuracy(target, value - 1, value, (value,) * calibrations)
            if recalibrates
            else Accuracy(target, value, None)
            for target, value in accuracies.items()
        ]
        add_run(results, config.optimizer.rule, config, rows, 1.0)
        save_results(results, run / "evaluation.json")
        return run

    return save


@pytest.fixture
def runs(store):
    sgd = dict(zip(NAMES, (91.0, 88.0, 40.0, 89.0, 60.0, 80.0), strict=True))
    multi = dict(zip(NAMES, (91.5, 91.0, 89.0, 90.0, 88.0, 85.0), strict=True))
    return [
        *(store(cifar10.sgd, seed, sgd) for seed in (0, 1)),
        *(store(cifar10.multi, seed, multi) for seed in (0, 1)),
    ]


def row(text, start):
    """The cells of the first line of a table that starts so."""
    (line, *_) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_runs_that_differ_in_their_seed_are_one_method(runs):
    (section,) = gather(runs)
    assert section.name == "cifar10-resnet20"
    assert list(section.results["methods"]) == ["SGD", "CrAM+-Multi"]
    entries = section.results["methods"]["SGD"]["runs"]
    assert [entry["seed"] for entry in entries] == [0, 1]


def test_the_report_has_our_figures_beside_the_papers(runs, tmp_path):
    out = tmp_path / "out"
    files = write_report(gather(runs), out)
    assert {path.name for path in files} == {
        "report.md",
        "cifar10-resnet20.json",
        "cifar10-resnet20.png",
        "cifar10-resnet20-uniform.png",
    }
    assert all(path.stat().st_size for path in files)
    text = (out / "report.md").read_text()
    assert row(text, "| SGD") == ["SGD", "cifar10_sgd", "400", "0, 1", "2"]
    assert row(text, "| 90 % |") == (
        ["90 %", "39.0 ± 0.0", "40.0 ± 0.0", "88.0 ± 0.0", "89.0 ± 0.0"]
    )
    differences = text[text.index("| points above dense SGD") :]
    # The dense network as it is, 90.0, for ours; tables 6 and 17 for the paper's, which
    # has none for SGD.
    assert row(differences, "| 90 % |") == ["90 %", "-50.0", "-1.0", "-2.7"]
    assert row(differences, "| 2:4") == ["2:4", "-10.0", "-5.0", ""]
    assert "Dense SGD: 90.0 %; the paper: 93.0 %" in text
    stored = load_results(out / "cifar10-resnet20.json")
    assert len(stored["methods"]["CrAM+-Multi"]["runs"]) == 2


def test_the_papers_figures_are_those_of_its_runs_alone():
    assert paper.difference(cifar10.config, "k95") == -3.8
    assert paper.difference(variant(cifar10.config, "x", rho=1.0), "k95") is None
    assert paper.difference(cifar10.multi, "2:4") is None
    assert paper.baseline(cifar10.sgd) == 93.0


def test_methods_of_one_kind_are_told_apart_by_name(store, tmp_path):
    accuracies = {"dense": 90.0, "k90": 80.0}
    names = [cifar10.multi, cifar10_ablations.configs[4]]
    (section,) = gather([store(config, 0, accuracies) for config in names])
    assert list(section.configs) == [
        "CrAM+-Multi",
        "CrAM+-Multi (cifar10_multi_dense_gradients)",
    ]
    files = write_report([section], tmp_path / "out")
    assert "above dense SGD" not in files[0].read_text()  # there is none


def test_runs_of_one_recipe_are_told_apart_by_their_settings(store):
    other = variant(cifar10.sgd, "other")
    longer = dataclasses.replace(other, epochs=9)
    changes = [(cifar10.sgd, 0), (other, 1), (longer, 2), (longer, 3)]
    (section,) = gather([store(config, n, {"dense": 90.0}) for config, n in changes])
    runs = {name: len(m["runs"]) for name, m in section.results["methods"].items()}
    assert runs == {"SGD": 1, "SGD (other)": 1, "SGD (other, epochs 9)": 2}
    decayed = variant(cifar10.sgd, cifar10.sgd.name, epochs=9, weight_decay=2e-3)
    changes = [(cifar10.sgd, 4), (decayed, 5)]
    (section,) = gather([store(config, n, {"dense": 90.0}) for config, n in changes])
    assert [*section.configs] == ["SGD", "SGD (weight_decay 0.002, epochs 9)"]


def test_a_run_on_another_network_has_its_own_section(store):
    other = dataclasses.replace(
        cifar10.config,
        name="other",
        model=dataclasses.replace(cifar10.config.model, name="resnet32"),
    )
    accuracies = {"dense": 90.0}
    sections = gather([store(c, 0, accuracies, 0) for c in (cifar10.config, other)])
    assert [s.name for s in sections] == ["cifar10-resnet20", "cifar10-resnet32"]


def test_runs_evaluated_on_other_examples_have_their_own_section(store, tmp_path):
    """Images held out instead of the test images, or another folder or file."""

    def own(folder, validation):
        data = dataclasses.replace(
            cifar10.sgd.data, name="folder", folder=folder, validation=validation
        )
        return dataclasses.replace(cifar10.sgd, name=f"{folder}{validation}", data=data)

    kinds = [("pets", 0), ("cars", 0), ("cars", 50)]
    runs = [store(own(*kind), 0, {"dense": 90.0 + i}) for i, kind in enumerate(kinds)]
    longer = dataclasses.replace(own("pets", 0), name="longer", epochs=500)
    sections = gather([*runs, store(longer, 0, {"dense": 91.0})])
    assert [[*section.configs] for section in sections] == [
        ["SGD", "SGD (longer)"],
        ["SGD"],
        ["SGD"],
    ]
    (report, *_) = write_report(sections, tmp_path / "out")
    lines = report.read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# folder-resnet20 (folder pets, validation 0)",
        "# folder-resnet20-2 (folder cars, validation 0)",
        "# folder-resnet20-3 (folder cars, validation 50)",
    ]
    facts = dataclasses.replace(squad.config, eval_file="facts.json")
    fewer = dataclasses.replace(squad.config.data, evaluation_examples=9)
    texts = [facts, dataclasses.replace(squad.config, data=fewer), squad.config]
    runs = [store(config, i, {"dense": 80.0}) for i, config in enumerate(texts)]
    assert len(gather(runs)) == 3


def test_networks_without_batch_norm_are_compared_as_pruned(store, tmp_path):
    runs = [
        store(cifar10.sgd, 0, {"dense": 91.0, "k90": 41.0}, recalibrates=False),
        store(cifar10.multi, 0, {"dense": 92.0, "k90": 88.0}, recalibrates=False),
    ]
    (report, *_) = write_report(gather(runs), tmp_path / "out")
    _, differences = report.read_text().split("| points above dense SGD")
    assert row(differences, "| dense |") == ["dense", "+0.0", "+1.0", "+0.2"]
    assert row(differences, "| 90 % |") == ["90 %", "-50.0", "-3.0", "-2.7"]


def test_a_target_that_some_seeds_lack_is_marked(store, tmp_path, capsys):
    both = {"dense": 90.0, "k90": 80.0}
    runs = [store(cifar10.sgd, seed, both) for seed in range(2)]
    runs.append(store(cifar10.sgd, 2, {"dense": 90.0}))
    out = tmp_path / "out"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert "80.0±0.0(2/3)" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    assert row(text, "| 90 % |") == ["90 %", "79.0 ± 0.0 (2/3)", "80.0 ± 0.0 (2/3)"]
    assert row(text, "| dense |") == ["dense", "89.0 ± 0.0", "90.0 ± 0.0"]
    assert "(1/3): of one of three seeds only" in text
    _, differences = text.split("| points above dense SGD")
    assert row(differences, "| 90 % |") == ["90 %", "-9.0 (2/3)"]


def test_every_machine_is_named_with_its_runs(store, tmp_path):
    runs = [store(cifar10.sgd, seed, {"dense": 90.0}) for seed in range(2)]
    (report, *_) = write_report(gather(runs), tmp_path / "out")
    assert report.read_text().count("Evaluated on") == 1
    results = load_results(runs[0] / "evaluation.json")
    results["machine"]["device"] = "H200"
    save_results(results, runs[0] / "evaluation.json")
    (report, *_) = write_report(gather(runs), tmp_path / "out")
    lines = report.read_text().splitlines()
    first, second = [line for line in lines if line.startswith("- Evaluated on")]
    assert "device H200" in first
    assert first.endswith(": SGD (seed 0).")
    assert "H200" not in second
    assert second.endswith(": SGD (seed 1).")


def test_a_label_with_a_bar_stays_in_its_column(store, tmp_path):
    frozen = variant(cifar10.sgd, cifar10.sgd.name, frozen="^(stem|head)/")
    runs = [store(cifar10.sgd, 0, {"dense": 90.0}), store(frozen, 1, {"dense": 91.0})]
    (report, *_) = write_report(gather(runs), tmp_path / "out")
    text = report.read_text()
    label = r"SGD (frozen ^(stem\|head)/)"
    assert f"| {label} | cifar10_sgd | 400 | 1 | 2 |" in text
    assert f"| SGD, recalibrated | {label}, pruned | {label}, recalibrated |" in text


def test_targets_of_one_run_alone_stand_where_it_has_them(store):
    some = store(cifar10.sgd, 0, {"dense": 90.0, "k70": 80.0, "k90": 40.0})
    more = dict.fromkeys(("dense", "2:4", "k70", "4bit", "k90", "k95"), 85.0)
    (section,) = gather([some, store(cifar10.multi, 0, more)])
    assert section.results["targets"] == list(more)


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"rule": "none"}, "SGD"),
        ({"rule": "cram_plus", "train_targets": ("k95",)}, "CrAM+-k95"),
        ({"rule": "cram", "train_targets": ("2:4", "4:8")}, "CrAM-N:M"),
        ({"rule": "topk_plus"}, "Top-K+-Multi"),
    ],
)
def test_methods_are_called_as_in_the_paper(changes, label):
    assert method_label(OptimizerConfig(**changes)) == label


def test_what_is_not_there_is_named(store, tmp_path, capsys):
    run = store(cifar10.sgd, 0, {"dense": 90.0})
    with pytest.raises(RunError, match="two runs of SGD with seed 0"):
        gather([run, run])
    with pytest.raises(RunError, match="at least one run"):
        gather([])
    (run / "evaluation.json").write_text("{")
    with pytest.raises(RunError, match="cannot read .*evaluation.json"):
        gather([run])
    (run / "evaluation.json").unlink()
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 1
    message = f"error: {run} was not evaluated; do it with\n  "
    message += f"python -m experiments evaluate {run}"
    assert message in capsys.readouterr().err


def test_targets_are_averaged_only_if_they_were_pruned_alike(store, tmp_path):
    runs = [store(cifar10.sgd, seed, {"dense": 90.0, "o90": 80.0}) for seed in (0, 1)]
    adam = variant(cifar10.sgd, "adam", base="adam")
    runs.append(store(adam, 0, {"o90": 70.0}, calibrations=3))

    def pruned_with(run, **values):
        results = load_results(run / "evaluation.json")
        (entry,) = results["methods"]["none"]["runs"]
        entry["settings"] = {"o90": values}
        save_results(results, run / "evaluation.json")

    for run in runs:
        pruned_with(run, gradients=64)
    text = write_report(gather(runs), tmp_path)[0].read_text()
    assert "- 90 % second order: gradients 64\n" in text
    pruned_with(runs[2], gradients=8)
    text = write_report(gather(runs), tmp_path)[0].read_text()
    assert "- 90 % second order: gradients 64 (SGD)\n" in text
    assert "- 90 % second order: gradients 8 (Adam)\n" in text
    pruned_with(runs[1], gradients=8)
    with pytest.raises(RunError, match="with gradients 8, that of seed 0 with .* 64"):
        gather(runs)


def test_a_run_that_was_trained_on_since_its_evaluation_is_refused(store):
    """As when epochs are added, or when an interrupted run goes on."""
    run = store(cifar10.sgd, 0, {"dense": 90.0})
    quieter = dataclasses.replace(cifar10.sgd, log_every=7, eval_targets=("k50",))
    save_config(run, quieter)
    assert gather([run])
    save_config(run, dataclasses.replace(cifar10.sgd, epochs=500))
    again = f"python -m experiments evaluate {run}"
    with pytest.raises(RunError, match=f"at epochs 400 and .* again with\n  {again}"):
        gather([run])
    save_config(run, cifar10.sgd)
    results = load_results(run / "evaluation.json")
    results["methods"]["none"]["runs"][0]["step"] = 20
    save_results(results, run / "evaluation.json")
    write_status(run, step=20)
    assert gather([run])
    write_status(run, step=40)
    with pytest.raises(RunError, match="at step 20 and has changed since"):
        gather([run])
    (run / "status.json").unlink()  # as where only results are kept
    assert gather([run])


@pytest.mark.parametrize("origin", ["init_from", "teacher"])
def test_runs_that_come_from_other_runs_are_other_methods(store, tmp_path, origin):
    """But for the seeds of those; of runs that are gone, the path counts."""
    plain, robust = (
        [tmp_path / f"{config.name}-{seed}" for seed in range(2)]
        for config in (cifar10.sgd, cifar10.multi)
    )
    for seed in range(2):
        for run, config in ((plain[seed], cifar10.sgd), (robust[seed], cifar10.multi)):
            save_config(run, dataclasses.replace(config, seed=seed))

    gone = tmp_path / "gone"
    starts = [plain[0], robust[0], robust[1], plain[1], gone, gone]
    runs = []
    for number, start in enumerate(starts):
        config = dataclasses.replace(cifar10.sgd, name="tuned", **{origin: str(start)})
        run = store(config, number % 2, {"dense": 90.0 + number})
        runs.append(run.rename(tmp_path / f"tuned{number}"))
    (section,) = gather(runs)
    seeds = {
        label: [entry["seed"] for entry in method["runs"]]
        for label, method in section.results["methods"].items()
    }
    assert seeds == {
        "SGD": [0, 1],
        f"SGD ({origin} {robust[0]})": [1, 0],
        f"SGD ({origin} {gone})": [0, 1],
    }


def test_a_run_that_replaced_the_one_it_comes_from_is_no_circle(store, tmp_path):
    start = tmp_path / "start"
    config = dataclasses.replace(cifar10.sgd, init_from=str(start))
    run = store(config, 0, {"dense": 90.0})
    save_config(start, dataclasses.replace(cifar10.sgd, init_from=str(run)))
    (section,) = gather([run])
    assert [*section.configs] == ["SGD"]


def test_what_a_run_starts_from_and_was_made_into_tells_runs_apart(store, tmp_path):
    """Fixed masks need a start, and a start of its own for every seed is one method."""
    started = dataclasses.replace(cifar10.sgd, init_from="")
    fixed = variant(started, "fixed", keep_pruned=True)
    starts = [tmp_path / f"start{number}" for number in range(3)]
    for start, target in zip(starts, ("k80", "k80", "k90"), strict=True):
        save_config(start, cifar10.sgd)
        (start / "compression.json").write_text(f'{{"target": "{target}"}}')

    def run_from(start, seed, accuracy, name="fixed"):
        config = dataclasses.replace(fixed, name=name, init_from=str(start))
        return store(config, seed, {"dense": accuracy})

    runs = [run_from(starts[0], 0, 90.0), run_from(starts[1], 1, 92.0)]
    runs.append(run_from(starts[2], 2, 80.0))
    made = store(variant(cifar10.sgd, "made"), 0, {"dense": 70.0})
    (made / "compression.json").write_text('{"target": "spdy2x"}')
    runs += [store(cifar10.sgd, 0, {"dense": 91.0}), made]
    (section,) = gather(runs)
    methods = section.results["methods"]
    assert [len(method["runs"]) for method in methods.values()] == [2, 1, 1, 1]
    *_, last = methods
    assert "spdy2x" in last
