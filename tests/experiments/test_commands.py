"""The command line, from end to end, in this process."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.commands import evaluate as evaluation_command
from experiments.commands import train as train_command
from experiments.commands.allocate import SETTINGS
from experiments.commands.audit import tables
from experiments.errors import ConfigError, DataError, RunError
from experiments.evaluation.allocation import Weighed, uniform_target
from experiments.evaluation.open_run import stored_data_dir
from experiments.evaluation.results import load_results
from experiments.images.config import ModelConfig
from experiments.recipes import digits
from experiments.runs.directory import load_config, locked, read_status
from experiments.runs.metrics import make_console
from experiments.runs.stored_config import from_dict

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = "--epochs 1 --model.widths 4 --model.blocks 1 --optimizer.train-targets k50"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """A tiny trained model."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert (
        main(f"train digits --run {run} --data-dir {data_dir}".split() + TINY.split())
        == 0
    )
    return run


def test_train_then_resume_does_nothing_more(run, data_dir, capsys):
    assert main(f"train --resume {run}".split()) == 0
    assert "20 steps" in capsys.readouterr().out
    assert main(f"train digits --run {run} --data-dir {data_dir} {TINY}".split()) == 1
    error = capsys.readouterr().err
    assert "is not empty" in error
    assert f"python -m experiments train --resume {run}" in error


def test_a_run_that_prunes_says_how_much(data_dir, tmp_path, capsys):
    command = f"train digits --run {tmp_path / 'run'} --data-dir {data_dir} {TINY}"
    assert main([*command.split(), "--optimizer.rule", "gradual"]) == 0
    message = "50.0 % of the prunable weights are zero; k50 was asked for"
    assert message in " ".join(capsys.readouterr().out.split())


def test_compress_stores_a_model_that_evaluates_the_same(run, data_dir, capsys):
    assert main(f"compress {run} --target k90 --data-dir {data_dir}".split()) == 0
    text = capsys.readouterr().out
    assert "stem/conv/kernel" in text
    assert "norm/scale" not in text
    assert "dense leaves of fewer than 2 dimensions" in text
    compressed = run / "compressed" / "k90"
    stored = json.loads((compressed / "compression.json").read_text())
    assert main(f"evaluate {compressed} --data-dir {data_dir}".split()) == 0
    results = json.loads((compressed / "evaluation.json").read_text())
    (again,) = results["methods"]["cram_plus"]["runs"]
    assert again["pruned"] == {"dense": stored["accuracy"]}


@pytest.mark.parametrize("verb", ["compress", "shrink"])
def test_a_model_that_is_replaced_leaves_nothing(verb, run, data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    command = f"{verb} {run} --target c50 --out {out} --data-dir {data_dir}".split()
    assert main(command) == 0
    assert main(command) == 0  # the same again
    (out / "evaluation.json").write_text("{}")  # of the model before
    (out / "best").mkdir()
    assert main(command) == 1
    found = capsys.readouterr().err
    assert f"holds c50 of {run}, best, evaluation.json: choose another --out" in found
    command.append("--overwrite")
    assert main(command) == 0
    assert not (out / "evaluation.json").exists()
    assert not (out / "best").exists()
    other = " ".join(command[:-1]).replace("c50", "c25")
    assert main(other.split()) == 1  # of another target
    assert f"holds c50 of {run}: choose another" in capsys.readouterr().err
    (out / "notes.txt").write_text("mine")
    assert main(command) == 1
    assert "'notes.txt', which no run wrote" in capsys.readouterr().err
    assert (out / "notes.txt").exists()


def test_a_model_stays_until_its_successor_is_stored(
    run, data_dir, monkeypatch, capsys
):
    command = f"compress {run} --target k50 --data-dir {data_dir}".split()
    assert main(command) == 0
    compressed = run / "compressed"
    before = (compressed / "k50" / "compression.json").read_text()

    def full(*arguments):
        raise RunError("no space left")

    monkeypatch.setattr("experiments.commands.compress.write_text", full)
    assert main(command) == 1
    assert "no space left" in capsys.readouterr().err
    assert (compressed / "k50" / "compression.json").read_text() == before
    assert (compressed / "k50" / "model").is_dir()
    assert not list(compressed.glob(".*"))


def test_a_model_is_not_written_over_its_run(run, capsys):
    for verb in ("compress", "shrink"):
        for out in (run, run.parent):
            words = f"{verb} {run} --target c50 --out {out} --overwrite"
            assert main(words.split()) == 1
            assert "out must be a directory of its own" in capsys.readouterr().err


def test_two_processes_do_not_store_one_model_at_once(run, tmp_path, capsys):
    """The second removed what the first was writing."""
    command = f"compress {run} --target k50 --out {tmp_path / 'k50'}".split()
    with locked(tmp_path / "k50"):
        assert main(command) == 1
        assert "another process is writing" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "k50").iterdir()] == [".lock"]
    assert main(command) == 0


def test_a_dry_run_takes_a_step_and_writes_nothing(data_dir, tmp_path, capsys):
    command = f"train digits --run {tmp_path / 'run'} --data-dir {data_dir} --dry-run"
    assert main(command.split() + TINY.split()) == 0
    assert "one step: loss " in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_several_processes_do_not_save_by_their_clocks(monkeypatch, capsys, tmp_path):
    """One would wait for ever for the others, at another step."""
    command = f"train digits --run {tmp_path / 'run'} --save-minutes 1 --max-steps 1"
    with monkeypatch.context() as patch:
        patch.setattr(train_command.jax, "process_count", lambda: 2)
        assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert "save_minutes must be 0 for several processes" in error


def test_only_a_resumed_run_reads_data_where_it_found_them(run, monkeypatch, capsys):
    seen = []

    def prepare(config, data_dir, *, workers):
        seen.append(data_dir)
        raise DataError("enough seen")

    monkeypatch.setattr(train_command, "prepare", prepare)
    again = ["train", "--resume", str(run)]
    assert main(again) == 1
    assert main(["train", "digits", "--run", str(run), "--overwrite"]) == 1
    assert seen == [stored_data_dir(run), None]
    capsys.readouterr()
    assert main([*again, "--overwrite"]) == 1
    assert "overwrite removes the run" in capsys.readouterr().err


def test_a_shrunken_run_is_a_run(run, data_dir, tmp_path, capsys):
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    target = f"{run} --target c50 --data-dir {data_dir}"
    assert main(f"compress {target} --out {tmp_path / 'masked'}".split()) == 0
    assert main(f"shrink {target} --out {small}".split()) == 0
    text = capsys.readouterr().out
    config = load_config(small)
    stem, inner, last = config.model.layer_widths
    assert stem == last
    assert stem + inner == 4  # of 8

    def sizes(stream, inner):
        """Parameters and multiply-adds: three convolutions, their norms, the head."""
        kernels = 9 * (stream + 2 * stream * inner)
        norms = 2 * (2 * stream + inner)
        return kernels + norms + 10 * stream + 10, 64 * kernels + 10 * stream

    (many, products), (few, fewer) = sizes(4, 4), sizes(stem, inner)
    assert f"Parameters {many:,} -> {few:,}, multiply-adds of one example" in text
    assert f"{products:,} -> {fewer:,}\n" in text
    masked, stored = (
        json.loads((folder / "compression.json").read_text())["accuracy"]
        for folder in (tmp_path / "masked", small)
    )
    assert stored == masked
    assert main(f"evaluate {small} --calibrations 1".split()) == 0
    results = json.loads((small / "evaluation.json").read_text())
    (again,) = results["methods"]["cram_plus"]["runs"]
    assert again["pruned"] == {"dense": masked}
    tune = f"train --config {small}/config.json --init-from {small} --run {tuned}"
    assert main(f"{tune} --data-dir {data_dir} --optimizer.rule none".split()) == 0
    assert load_config(tuned).model == config.model


def test_evaluate_prints_a_table(run, data_dir, capsys):
    command = f"evaluate {run} --targets dense k50 --data-dir {data_dir}".split()
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"{run}:\n" in text
    assert "recalib." in text
    assert "50 %" in text
    # The title breaks in a table as narrow as this.
    assert "3 calibrations" in " ".join(text.split())
    results = load_results(run / "evaluation.json")
    ((entry,),) = (method["runs"] for method in results["methods"].values())
    assert entry["step"] == read_status(run)["step"] == 20


def test_a_stopped_evaluation_goes_on(run, data_dir, monkeypatch, capsys):
    command = f"evaluate {run} --targets k60 2:4 --data-dir {data_dir}".split()
    evaluate = evaluation_command.evaluate_target
    seen = []

    def stopped(*args, **kwargs):
        seen.append(args[-1])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(evaluation_command, "evaluate_target", stopped)
    assert main(command) == 130
    assert (run / "evaluation.part.json").exists()
    assert main(command) == 0
    assert seen == ["k60", "2:4", "2:4"]
    assert not (run / "evaluation.part.json").exists()
    capsys.readouterr()


def test_report_reads_what_evaluate_stored(run, data_dir, tmp_path, capsys):
    command = f"evaluate {run} --targets dense k50 k90 --data-dir {data_dir}"
    assert main([*command.split(), "--calibrations", "2"]) == 0
    assert main(["report", str(run), "--out", str(tmp_path)]) == 0
    assert "report.md" in capsys.readouterr().out
    assert "| CrAM+-k50 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "digits-resnet.png").exists()
    assert main(["report", str(run), "--json"]) == 0
    (results,) = json.loads(capsys.readouterr().out).values()
    assert {"dense", "k50", "k90"} <= set(results["targets"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate nowhere", "nowhere is not a run"),
        ("train digitz", "no recipe is called 'digitz'; did you mean digits"),
        ("train", "train needs a recipe, such as digits"),
        ("lottery", "lottery needs a recipe, such as digits"),
        ("lottery digits_acdc", "rule must be one of none, sam"),
        ("lottery digits --rounds 0", "rounds must be at least 1, got 0"),
        ("compress nowhere --target 90", "target '90' is unknown"),
        ("shrink nowhere --target c50+4bit", "target must remove channels only"),
        ("train cifar10 --data-dir nowhere", "cifar10 is not in nowhere"),
        ("demo --seeds 0", "seeds must be at least 1, got 0"),
        ("evaluate nowhere --calibrations 0", "calibrations must be at least 1"),
    ],
)
def test_what_the_user_can_put_right_is_one_message(
    command, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 1
    error = capsys.readouterr().err.removeprefix("starting jax ...\n")
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train digits --optimizer.radius 1", "Unrecognized options"),
        ("train digits --optimizer.rho -1", "rho must be at least 0"),
        ("train digits --optimizer.rule adam", "invalid choice"),
    ],
)
def test_the_parser_refuses_what_it_does_not_know(command, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(command.split())
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_a_tiny_demo_compares_the_methods(data_dir, tmp_path, capsys, monkeypatch):
    """All of the demo but its size: a smaller network, fewer targets."""
    optimizer = dataclasses.replace(
        digits.config.optimizer, train_targets=("k50", "k90")
    )
    model = ModelConfig(widths=(4,), blocks=(1,))
    small = dataclasses.replace(
        digits.config,
        model=model,
        optimizer=optimizer,
        eval_targets=("dense", "k90", "k95", "2:4"),
    )
    monkeypatch.setattr(digits, "config", small)
    blocks = dataclasses.replace(
        digits.blocks,
        optimizer=dataclasses.replace(optimizer, train_targets=("b50",)),
        eval_targets=("dense", "b50"),
    )
    monkeypatch.setattr(digits, "blocks", blocks)
    out = tmp_path / "demo"
    command = f"demo --seeds 1 --epochs 1 --run {out} --data-dir {data_dir}"
    assert main(command.split()) == 0
    assert "Try next" in capsys.readouterr().out
    results = load_results(out / "results.json")
    assert list(results["methods"]) == ["SGD", "SGD*", "SAM", "CrAM+"]
    assert (out / "accuracy_vs_sparsity.png").exists()
    if importlib.util.find_spec("llvmlite"):
        assert (out / "tradeoff.png").exists()
    sgd = results["methods"]["SGD"]["runs"][0]["config"]
    assert (sgd["epochs"], sgd["optimizer"]["rule"]) == (2, "none")
    assert load_config(out / "sgd-seed0") == from_dict(sgd)


def test_the_package_is_a_program():
    finished = subprocess.run(
        [sys.executable, "-m", "experiments", "evaluate", "nowhere"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stderr == "error: nowhere is not a run: it has no config.json\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train own_images", "images of your own need --data.folder"),
        ("train own_images --data.folder nowhere", "there is no folder nowhere"),
        (
            "train own_texts --weights BERT",
            "JSONL file with --train-file",
        ),
        (
            "train own_texts --weights BERT --train-file no.csv --eval-file no.csv",
            "no.csv is missing",
        ),
        ("train sst2", "name their directory with --weights"),
        (
            "train squad --weights B --train-file no.json",
            "it should be SQuAD v1.1 JSON",
        ),
    ],
)
def test_what_is_not_named_or_not_there_is_said_before_jax_starts(
    command, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_audit_says_who_gets_other_answers(run, data_dir, tmp_path, capsys):
    groups = tmp_path / "groups.txt"
    groups.write_text("\n".join("ab"[i % 2] for i in range(500)))
    command = f"audit {run} --targets ru50 k0 --data-dir {data_dir} --groups {groups}"
    assert main(command.split()) == 0
    text = capsys.readouterr().out
    assert "50 % uniform refitted" in text
    found = json.loads((run / "audit.json").read_text())
    assert list(found) == ["dense", "ru50", "k0"]
    # Nothing is removed: recalibration is not an effect of pruning.
    assert found["k0"] == found["dense"]
    assert found["dense"]["disagreement"] == found["dense"]["broken"] == 0
    for row in found.values():
        by_group = row["by group"]
        assert list(by_group) == ["a", "b"]
        # Of 250 examples each.
        assert sum(by_group.values()) / 2 == pytest.approx(row["accuracy"])
        assert len(row["by class"]) == 10
        assert row["broken"] <= row["disagreement"]
    groups.write_text("a")
    assert main(command.split()) == 1
    assert "a line for each of the 500 examples" in capsys.readouterr().err
    groups.write_bytes(b"caf\xe9")
    assert main(command.split()) == 1
    assert f"cannot read {groups}" in capsys.readouterr().err


def test_many_groups_are_rows(capsys):
    answers = {"by group": {f"group {i}": i / 100 for i in range(60)}, "accuracy": 0.5}
    for table in tables({"dense": answers, "k50": answers}):
        make_console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["group", "dense", "50", "%"] for line in lines)
    assert any(line.split() == ["group", "7", "7.0", "7.0"] for line in lines)


def test_allocate_compares_masks_at_equal_cost(run, data_dir, capsys):
    command = f"allocate {run} --speedup 1.5 --levels 4 --starts 4 --examples 64"
    assert main(f"{command} --pruner u --data-dir {data_dir}".split()) == 0
    assert "accuracy (%) at equal multiply-adds" in capsys.readouterr().out
    found = json.loads((run / "allocation-multiply_adds-u.json").read_text())
    for method in found["1.5x"]["methods"].values():
        # Four levels are coarse; counts of weights are whole.
        assert method["share"] <= 1 / 1.5 + 0.01
    assert found["1.5x"]["methods"]["uniform"]["share"] >= 1 / 1.5 - 0.01
    stored = run / "compressed" / "spdy1.5x-multiply_adds-u"
    assert main(f"evaluate {stored} --data-dir {data_dir}".split()) == 0
    assert (stored / "evaluation.json").exists()
    again = command.replace("1.5", "1.25") + f" --pruner u --data-dir {data_dir}"
    assert main(again.split()) == 0
    both = json.loads((run / "allocation-multiply_adds-u.json").read_text())
    assert both["1.5x"] == found["1.5x"]
    assert both["1.25x"]["methods"]
    assert main(again.split()) == 0
    assert "1.25x was found before" in capsys.readouterr().out
    assert main(again.replace("--levels 4", "--levels 3").split()) == 0
    assert "was of another levels" in capsys.readouterr().out
    aside = json.loads((run / "allocation-multiply_adds-u.1.json").read_text())
    assert aside == both
    earlier = stored.with_name(f"{stored.name}.1")
    assert (earlier / "evaluation.json").exists()
    assert json.loads((earlier / "compression.json").read_text())["settings"] == {
        name: both[name] for name in SETTINGS
    }
    assert not stored.exists()
    stored = run / "compressed" / "spdy1.25x-multiply_adds-u"
    assert stored.with_name(f"{stored.name}.1").exists()
    assert main(f"allocate {stored} --speedup 2 --data-dir {data_dir}".split()) == 1
    assert "path must be a dense run, got" in capsys.readouterr().err
    reseeded = again.replace("--speedup", "--seed 1 --speedup 900")
    assert main(reseeded.split()) == 1
    assert "speedup must be smaller" in capsys.readouterr().err
    assert stored.exists()  # nothing moves for what fails


def test_a_budget_below_the_sparsest_levels_is_refused_before_the_search():
    """At 99 % zeros 1 of 100 is left, and another 1 is spent apart: 50.5 times less."""
    curves = {"kernel": (np.array([0.0, 1.0]), np.array([0.0, 100.0]))}
    leaves = {"kernel": np.ones(100)}
    weighed = Weighed(leaves, curves, 1.0, ["kernel"], "multiply_adds")
    target = uniform_target(weighed, "u", 101 / 50)
    assert float(target.removeprefix("u")) == pytest.approx(98.98)
    with pytest.raises(ConfigError, match=r"60.00 times fewer .* at most 99 % zeros"):
        uniform_target(weighed, "u", 101 / 60)
