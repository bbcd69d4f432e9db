"""Full disks, unwritable directories, damaged checkpoints: what was there stays."""

import contextlib
import dataclasses
import gc
import json
import resource

import jax
import numpy as np
import pytest

from experiments import checkpoints
from experiments.__main__ import main
from experiments.errors import RunError
from experiments.run_directory import load_config
from experiments.step import init_state
from experiments.training import train

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    # Callbacks of tensorstore that come late find their event loop closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def late_callbacks_stay_in_their_test():
    yield
    gc.collect()


@contextlib.contextmanager
def largest_file(size):
    """Refuses to let a file grow beyond so many bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def setting(with_method, data, task, train_step, progress):
    """The arguments of a run of two epochs, with a checkpoint at steps 5 and 10."""
    config = dataclasses.replace(with_method("cram_plus"), evaluate_every=0)
    return config, data, task, progress, train_step("cram_plus")


def run_training(run, setting, before_step=lambda step: None, **options):
    config, data, task, progress, train_step = setting

    def step(state, batch):
        before_step(int(state.step))
        return train_step(state, batch)

    return train(config, run, data, task, progress, train_step=step, **options)


@pytest.fixture
def undisturbed(tmp_path, setting):
    return run_training(tmp_path / "undisturbed", setting)


def assert_same_parameters(one, other):
    for a, b in zip(
        jax.tree.leaves((one.params, one.batch_stats)),
        jax.tree.leaves((other.params, other.batch_stats)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def steps(run):
    names = [path.name for path in (run / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


@pytest.mark.parametrize(
    ("size", "what"), [(0, "metrics.jsonl"), (6000, "checkpoints/10")]
)
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    size, what, tmp_path, setting, undisturbed
):
    run = tmp_path / "run"
    with (
        largest_file(size) as fill_up,
        pytest.raises(RunError, match=f"cannot write .*{what}: .*[Ff]ile too large"),
    ):
        run_training(run, setting, lambda step: fill_up() if step == 7 else None)
    assert steps(run) == [5]
    config, data, task, *_ = setting
    with checkpoints.manager(run) as manager:
        assert (
            int(checkpoints.restore(manager, init_state(config, data, task)).step) == 5
        )
    assert_same_parameters(run_training(run, setting, resume=True), undisturbed)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in line][-1] == 10


def test_a_line_that_was_cut_off_does_not_stop_a_resumed_run(tmp_path, setting):
    run_training(tmp_path / "run", setting)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 10, "lo')
    run_training(tmp_path / "run", setting, resume=True)
    assert path.read_text() == whole


@pytest.mark.parametrize("damage", ["truncated", "removed", "zeroed"])
@pytest.mark.parametrize("name", ["largest", "_METADATA", "manifest.ocdbt"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    name, damage, tmp_path, setting, undisturbed
):
    run = tmp_path / "run"
    run_training(run, setting)
    last = run / "checkpoints" / "10" / "default"
    path = last / name
    if name == "largest":
        files = [path for path in last.rglob("*") if path.is_file()]
        path = max(files, key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    half = content[: len(content) // 2]
    if damage == "removed":
        path.unlink()
    else:
        rest = b"\0" * (len(content) - len(half)) if damage == "zeroed" else b""
        path.write_bytes(half + rest)

    advice = r"cannot read .*checkpoints/10: .*; remove it to go on from step 5"
    with pytest.raises(RunError, match=advice):
        run_training(run, setting, resume=True)
    assert steps(run) == [5, 10]
    for entry in sorted((run / "checkpoints" / "10").rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    (run / "checkpoints" / "10").rmdir()
    assert_same_parameters(run_training(run, setting, resume=True), undisturbed)


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"name": ')
    with pytest.raises(RunError, match=r"cannot read .*config\.json: Expecting value"):
        load_config(tmp_path)


def test_a_damaged_model_is_named(tmp_path, setting):
    config, data, task, *_ = setting
    state = init_state(config, data, task)
    checkpoints.save_model(tmp_path, config, state.params, state.batch_stats)
    (tmp_path / "model" / "_METADATA").write_text("{")
    with pytest.raises(RunError, match=r"cannot read .*model: "):
        checkpoints.load_model(tmp_path, state)


def test_a_directory_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("here")
    command = f"train digits --data-dir {tmp_path} --run {tmp_path / 'file' / 'run'}"
    assert main(command.split()) == 1
    assert "error: cannot write" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "here"


def test_a_directory_without_permission_is_named(tmp_path, setting):
    run_training(tmp_path / "run", setting)
    directory = tmp_path / "run" / "checkpoints"
    directory.chmod(0o500)
    try:
        (directory / "probe").mkdir()
    except PermissionError:
        pass
    else:
        (directory / "probe").rmdir()
        directory.chmod(0o700)
        pytest.skip("this user may write everywhere")
    try:
        last = directory / "10"
        assert last.exists()
        with pytest.raises(RunError, match="cannot write .*run"):
            checkpoints.save_model(directory / "model", setting[0], {}, {})
    finally:
        directory.chmod(0o700)
