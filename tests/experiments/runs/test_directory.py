"""What a run may write and remove, and what damaged files are called."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.config import OptimizerConfig, RunConfig
from experiments.errors import ConfigError, RunError, command_line
from experiments.images.config import DataConfig, ImageConfig
from experiments.runs.directory import (
    check_free,
    check_output,
    check_path,
    check_resumable,
    clear,
    load_config,
    locked,
    read_status,
    save_config,
    state_of,
    write_status,
)
from experiments.runs.metrics import read_lines
from experiments.runs.stored_config import from_dict, to_dict

RESULTS = Path(__file__).parents[3] / "results"


@pytest.fixture
def run(tmp_path):
    """A run that has left a little of everything."""
    run = tmp_path / "run"
    save_config(run, ImageConfig())
    write_status(run, state="finished", step=3, steps=3)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "checkpoints" / "3").mkdir(parents=True)
    for name in ("evaluation.1.json", "audit.json", "allocation-bytes-rg.json"):
        (run / name).write_text("{}")
    for inner in (run / "best", run / "compressed" / "k90"):
        save_config(inner, ImageConfig())
        (inner / "model" / "d").mkdir(parents=True)
        (inner / "evaluation.json").write_text("{}")
        (inner / "vocabulary").mkdir()
        (inner / "vocabulary" / "words.txt").write_text("the")
    (run / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    return run


def test_a_run_of_ours_may_be_overwritten(run):
    with locked(run):
        check_free(run, overwrite=True)
        clear(run)
        assert [path.name for path in run.iterdir()] == [".lock"]
    check_free(run, overwrite=False)  # what is left is no run


def test_a_model_that_was_made_from_a_run_cannot_be_resumed(run, capsys):
    """It would train from random weights, and the model would stay what is read."""
    check_resumable(run)
    shutil.rmtree(run / "checkpoints")
    check_resumable(run)  # killed before its first checkpoint
    for made in (run / "best", run / "compressed" / "k90"):
        write_status(made, step=3)
        assert main(["train", "--resume", str(made), "--max-steps", "1"]) == 1
        again = f"train --config {made / 'config.json'} --init-from {made}"
        assert again in capsys.readouterr().err
        assert not (made / "checkpoints").exists()


def test_nothing_foreign_is_removed(run, tmp_path):
    with pytest.raises(RunError, match=r"not empty.*\n.*train --resume"):
        check_free(run, overwrite=False)
    model = tmp_path / "bert"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "bert", "hidden_size": 768}')
    with pytest.raises(RunError, match="not a run of ours, remove it yourself"):
        check_free(model, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(run)
    with pytest.raises(RunError, match="symbolic link"):
        check_free(link, overwrite=True)
    (run / "thesis.tex").write_text("three years")
    with pytest.raises(RunError, match=r"'thesis.tex', which no run wrote"):
        check_free(run, overwrite=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="not a directory"):
        check_free(file, overwrite=True)


@pytest.mark.parametrize(
    "name",
    [
        "best/notes.txt",
        "checkpoints/2026 notes.txt",
        "compressed/notes.txt",
        "compressed/k90/notes.txt",
        "compressed/k90/compressed/u90/notes.txt",
        "compressed/notes/notes.txt",
        "audit.json/notes.txt",
    ],
)
def test_nothing_foreign_is_removed_from_inside_a_run(name, run):
    if name.startswith("audit"):
        (run / "audit.json").unlink()
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("three years")
    named = path.parent.name if name.startswith("audit") else name
    with pytest.raises(RunError, match=rf"{run} holds '{named}', which no run wrote"):
        check_free(run, overwrite=True)


def test_a_link_inside_a_run_is_removed_and_not_followed(run, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    shutil.rmtree(run / "best")
    (run / "best").symlink_to(outside)
    check_free(run, overwrite=True)
    clear(run)
    assert (outside / "kept").exists()


def test_one_process_writes_a_run_and_a_killed_one_leaves_no_lock(run):
    hold = "import sys; from experiments.runs.directory import locked\n"
    hold += "from pathlib import Path\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is writing"), locked(run):
            pass
        process.kill()
        process.wait()
    with locked(run):
        pass


@pytest.mark.parametrize("name", ["a[1]", "what?", "all*", "line\nbreak"])
def test_paths_under_which_checkpoints_would_be_lost_are_refused(name, tmp_path):
    with pytest.raises(RunError, match="cannot be"):
        check_path(tmp_path / name)
    check_path(tmp_path / "with space, [bold".replace("[", "("))
    with pytest.raises(RunError, match="too long"):
        check_path(tmp_path / ("n" * 300))


def test_hints_quote_what_a_shell_would_split():
    assert command_line("evaluate", Path("runs/my run")) == (
        "python -m experiments evaluate 'runs/my run'"
    )


VALID = to_dict(ImageConfig())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '"text"',
        "[" * 100_000,
        "\x00\x01",
        json.dumps({"model_type": "bert"}),
        json.dumps({**VALID, "kind": "sound"}),
        json.dumps({**VALID, "kind": []}),
        json.dumps({**VALID, "epochs": "20"}),
        json.dumps({**VALID, "epochs": True}),
        json.dumps({**VALID, "epochs": 1.5}),
        json.dumps({**VALID, "seed": 2**31}),
        json.dumps({**VALID, "label_smoothing": float("nan")}),
        json.dumps({**VALID, "optimizer": None}),
        json.dumps({**VALID, "optimizer": [1]}),
        json.dumps({**VALID, "optimizer": {"rho": "large"}}),
        json.dumps({**VALID, "optimizer": {"rho": float("inf")}}),
        json.dumps({**VALID, "optimizer": {"rule": ["none"]}}),
        json.dumps({**VALID, "eval_targets": "k90"}),
        json.dumps({**VALID, "eval_targets": [90]}),
        json.dumps({**VALID, "data": {"name": 3}}),
        json.dumps({**VALID, "model": {"widths": [0]}}),
        json.dumps({**VALID, "model": {"name": "resnet9"}}),
        json.dumps({**VALID, "name": "a/b"}),
        json.dumps({**VALID, "more": 1}),
    ],
)
def test_a_damaged_configuration_is_one_clear_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"cannot read .*config\.json: ") as info:
        load_config(tmp_path)
    assert len(str(info.value)) < 700
    assert "\n" not in str(info.value)


def test_a_configuration_that_is_no_text_or_no_file_is_one_clear_line(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="cannot read"):
        load_config(tmp_path)
    other = tmp_path / "other"
    (other / "config.json").mkdir(parents=True)
    with pytest.raises(RunError, match="cannot read"):
        load_config(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageConfig(seed=2**31),
        lambda: ImageConfig(evaluate_every=float("inf")),
        lambda: ImageConfig(name=""),
        lambda: ImageConfig(name="n" * 200),
        lambda: ImageConfig(name="../up"),
        lambda: ImageConfig(name="two\nlines"),
        lambda: OptimizerConfig(learning_rate=float("nan")),
        lambda: OptimizerConfig(rho=float("inf")),
        lambda: DataConfig(batch_size=2**40),
        lambda: OptimizerConfig(train_targets=("b90@0x2",)),
    ],
)
def test_numbers_and_names_that_nothing_can_hold_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_stored_runs_of_version_0_1_are_read():
    stored = {
        path: json.loads(path.read_text()) for path in RESULTS.glob("*/*/config.json")
    }
    old_ones = {p: v for p, v in stored.items() if "method" in v["optimizer"]}
    assert len(old_ones) > 10
    for path, values in old_ones.items():
        config = load_config(path.parent)
        assert isinstance(config, RunConfig)
        old = values["optimizer"]["method"]
        assert config.optimizer.rule == {"sgd": "none"}.get(old, old)
        assert list(config.eval_targets) == values["targets"]
        assert from_dict(to_dict(config)) == config


def test_metrics_that_were_cut_off_are_left_out_and_damaged_ones_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert list(read_lines(path, 2)) == ['{"step": 1}\n', '{"step": 2}\n']
    for damage in ("[]", '{"loss": 1}', "\x00", '{"step": null}'):
        path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
        with pytest.raises(RunError, match="line 2 is damaged; remove it"):
            list(read_lines(path, 9))


def test_a_run_says_how_far_it_came(run):
    assert state_of(run) == ""
    write_status(run, state="interrupted", step=4, steps=9)
    assert state_of(run).endswith("its last checkpoint is at step 4 of 9")
    write_status(run, state="diverged", why="the loss is nan at step 5")
    assert "has diverged: the loss is nan at step 5" in state_of(run)
    (run / "status.json").write_text("[")
    assert read_status(run) == {}


@pytest.mark.parametrize("name", ["config.json", "status.json"])
def test_results_do_not_replace_what_a_run_keeps(run, name):
    file = run / name
    with pytest.raises(ConfigError, match=f"must not be a file .*, got {file}"):
        check_output(file, ".json", "audit.json")
    with pytest.raises(ConfigError, match="out must be a file ending in .png"):
        check_output(file, ".png")
    check_output(run / "audit.json", ".json", "audit.json")
    check_output(run / "mine.json", ".json")
