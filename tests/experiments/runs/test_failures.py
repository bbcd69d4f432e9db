"""Full disks, unwritable directories, damaged checkpoints: what was there stays."""

import contextlib
import dataclasses
import errno
import gc
import json
import os
import resource
import shutil
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from cram_jax.writing import replacing
from experiments.__main__ import main
from experiments.batches import Examples
from experiments.errors import NonFiniteLoss, RunError, Stopped
from experiments.images.task import classification
from experiments.reports.display import save_picture
from experiments.runs import checkpoints
from experiments.runs.checksums import checksums
from experiments.runs.directory import check_free, load_config, state_of
from experiments.runs.late_reads import late_reads_ignored
from experiments.runs.loggers import LOGGERS
from experiments.runs.metrics import make_console, progress_bar
from experiments.training.loop import Cadence, train
from experiments.training.step import init_state
from experiments.verbs.recipes import Recipes

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
    size, what, tmp_path, setting, trained
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
    assert_same_parameters(run_training(run, setting, resume=True), trained[1])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in line][-1] == 10


def test_a_picture_that_a_full_disk_cuts_off_leaves_the_one_before(tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_text("before")
    with largest_file(100) as fill_up:
        fill_up()
        with pytest.raises(RunError, match=r"cannot write .*picture.png: .* too large"):
            save_picture(Figure(), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert picture.read_text() == "before"


def test_a_full_disk_is_one_message_wherever_it_shows(monkeypatch, capsys):
    def written(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Recipes, "execute", written)
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err == "error: cannot write: No space left on device\n"


def test_a_run_goes_on_only_with_as_many_examples(tmp_path, setting, trained):
    """Others would be in another order, and the schedule of another length."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    config, data, *others = setting
    fewer = data._replace(train=Examples(data.train.take(range(32))))
    with pytest.raises(RunError, match="with 40 training examples, and there are 32"):
        run_training(run, (config, fewer, *others), resume=True)
    assert_same_parameters(run_training(run, setting, resume=True), trained[1])


def test_a_line_that_was_cut_off_does_not_stop_a_resumed_run(tmp_path, setting):
    run_training(tmp_path / "run", setting)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 10, "lo')
    run_training(tmp_path / "run", setting, resume=True)
    assert path.read_text() == whole


def damage(last, name, how):
    """Damages a file of a checkpoint, or every file of arrays: some are never read."""
    for path in last.rglob("d/*") if name == "arrays" else [last / name]:
        content = path.read_bytes()
        middle = len(content) // 2
        if how == "removed":
            path.unlink()
        elif how == "flipped":
            flipped = bytes([content[middle] ^ 16])
            path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
        else:
            rest = b"\0" * (len(content) - middle) if how == "zeroed" else b""
            path.write_bytes(content[:middle] + rest)


@pytest.fixture(scope="module")
def trained(with_method, data, task, train_step, tmp_path_factory):
    """A finished run of two checkpoints, and its last state."""
    config = dataclasses.replace(with_method("cram_plus"), evaluate_every=0)
    run = tmp_path_factory.mktemp("runs") / "run"
    with progress_bar(make_console()) as bar:
        setting = (config, data, task, bar, train_step("cram_plus"))
        return run, run_training(run, setting)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("arrays", "flipped"),
        ("arrays", "truncated"),
        ("_METADATA", "removed"),
        ("manifest.ocdbt", "zeroed"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    name, how, tmp_path, setting, trained, capsys
):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    damage(run / "checkpoints" / "10" / "default", name, how)
    state = run_training(run, setting, resume=True, quiet=False)
    assert_same_parameters(state, trained[1])
    assert steps(run) == [5, 10]
    said = " ".join(capsys.readouterr().out.split())
    assert "resuming from the previous checkpoint, 5" in said
    # One that is stopped before the damaged step has saved what it did.
    damage(run / "checkpoints" / "10" / "default", name, how)
    stopped = run_training(run, setting, resume=True, max_steps=8)
    assert int(stopped.step) == 8
    assert steps(run) == [5, 8]
    assert_same_parameters(run_training(run, setting, resume=True), trained[1])
    assert steps(run) == [8, 10]
    # Both at once: there is nothing to go on from, and nothing is removed.
    for step in ("8", "10"):
        damage(run / "checkpoints" / step / "default", name, how)
    with pytest.raises(RunError, match="no earlier checkpoint is whole"):
        run_training(run, setting, resume=True)
    assert steps(run) == [8, 10]


def test_a_checkpoint_of_another_configuration_is_not_called_damaged(
    trained, tmp_path, setting
):
    config, data, _, *_ = setting
    model = dataclasses.replace(config.model, widths=(4, 12))
    other = dataclasses.replace(config, model=model)
    like = init_state(other, data, classification(other, data))
    with pytest.raises(RunError, match=r"is of another configuration than .*8.* there"):
        checkpoints.load_model(trained[0], like)


def test_a_checkpoint_of_another_dtype_is_not_called_damaged(trained, setting):
    config, data, task, *_ = setting
    like = jax.eval_shape(lambda: init_state(config, data, task))
    half = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), like.params
    )
    match = r"is of another configuration .* is float32\[.* there and bfloat16\["
    with (
        checkpoints.manager(trained[0]) as manager,
        pytest.raises(RunError, match=match),
    ):
        checkpoints.restore(manager, like._replace(params=half))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_a_checksum_sees_every_flipped_bit(dtype):
    leaf = jnp.arange(12).reshape(3, 4).astype(dtype)
    before = checksums({"leaf": leaf})
    assert before.shape == (1, 2)
    content = np.array(leaf)
    size = content.dtype.itemsize
    for bit in range(0, 8 * content.nbytes, 1 if size == 1 else 7):
        flipped = content.copy()
        flipped.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
        assert not np.array_equal(checksums([flipped]), before)
    np.testing.assert_array_equal(checksums([content]), before)


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


def test_a_model_is_kept_until_its_successor_is_complete(tmp_path, setting):
    def model(seed):
        values = np.random.default_rng(seed).normal(size=(200, 200))
        return {"kernel": jnp.asarray(values, jnp.float32)}

    def assert_holds(seed):
        params, _ = checkpoints.read_model(tmp_path)
        np.testing.assert_array_equal(params["kernel"], model(seed)["kernel"])
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"config.json", "model"}

    checkpoints.save_model(tmp_path, setting[0], model(1), {})
    with largest_file(20_000) as fill_up:
        fill_up()
        with pytest.raises(RunError, match="cannot write .*model: "):
            checkpoints.save_model(tmp_path, setting[0], model(2), {})
    assert_holds(1)
    # What a process leaves that is killed while it saves.
    for name in (".model.part", ".model.part.orbax-checkpoint-tmp"):
        (tmp_path / name / "d").mkdir(parents=True)
    check_free(tmp_path, overwrite=True)
    checkpoints.save_model(tmp_path, setting[0], model(3), {})
    assert_holds(3)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("")
    rename = os.replace

    def full(source, to):
        if to == path and (source / "new").exists():
            raise OSError("no space left")
        rename(source, to)

    def write():
        with replacing(path) as beside:
            beside.mkdir()
            (beside / "new").write_text("")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            write()
    assert [*tmp_path.glob("*/*")] == [path / "old"]
    write()
    assert [*tmp_path.glob("*/*")] == [path / "new"]


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


def test_late_reads_of_a_failed_restore_print_nothing(monkeypatch):
    def raise_later(error, source=None):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error, object=source))

    seen, names = [], {}
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    exec(compile("async def read(): pass", "orbax/serialization.py", "exec"), names)
    read = names["read"]()
    with late_reads_ignored():
        raise_later(RuntimeError("Event loop is closed"))
        raise_later(ValueError("Encountered error while reading"), read)
        raise_later(ValueError("ours"))
    read.close()
    assert [str(each.exc_value) for each in seen] == ["ours"]


def test_a_signal_between_two_steps_loses_none(tmp_path, setting, monkeypatch):
    class Interrupting:
        def __init__(self, *run):
            pass

        def write(self, step, values):
            if step == 6:  # after it was decided that step 6 is not saved
                signal.raise_signal(signal.SIGTERM)

        def close(self):
            pass

    monkeypatch.setitem(LOGGERS, "tensorboard", Interrupting)
    config, *rest = setting
    setting = dataclasses.replace(config, log_every=1), *rest
    with pytest.raises(Stopped, match="stopped at step 7 of 10"):
        run_training(tmp_path / "run", setting, loggers=("tensorboard",))
    assert steps(tmp_path / "run") == [5, 7]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_at_a_checkpoint_and_it_goes_on(
    number, tmp_path, setting, trained
):
    run = tmp_path / "my run"

    def stop(step):
        if step == 6:
            signal.raise_signal(number)

    message = "stopped at step 7 of 10.*\\n.*train --resume '.*my run'"
    with pytest.raises(Stopped, match=message) as info:
        run_training(run, setting, stop)
    assert info.value.signal == number
    assert steps(run) == [5, 7]
    assert "unfinished: its last checkpoint is at step 7 of 10" in state_of(run)
    state = run_training(run, setting, resume=True)
    assert_same_parameters(state, trained[1])
    assert state_of(run) == ""


def test_a_signal_in_the_last_evaluation_ends_more_than_the_run(tmp_path, setting):
    config, data, task, *others = setting

    def evaluate(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return task.evaluate(*arguments)

    setting = config, data, task._replace(evaluate=evaluate), *others
    with pytest.raises(Stopped, match="run is complete.*\n.*evaluate .*run") as info:
        run_training(tmp_path / "run", setting)
    assert info.value.signal == signal.SIGTERM
    assert state_of(tmp_path / "run") == ""
    state = run_training(tmp_path / "run", setting, resume=True)
    assert int(state.step) == 10


def test_an_evaluation_that_fails_in_the_middle_costs_no_step(tmp_path, setting):
    config, data, task, *others = setting
    config = dataclasses.replace(config, evaluate_every=0.6, checkpoint_every=0)

    def evaluate(*arguments):
        raise OSError("unreadable")

    run = tmp_path / "run"
    failing = config, data, task._replace(evaluate=evaluate), *others
    with pytest.raises(OSError, match="unreadable"):
        run_training(run, failing)
    assert steps(run) == [3]
    assert int(run_training(run, (config, data, task, *others), resume=True).step) == 10


def test_a_signal_before_a_divergence_is_not_lost(tmp_path, setting):
    config, data, task, progress, train_step = setting

    def diverging(state, batch):
        signal.raise_signal(signal.SIGTERM)
        state, values = train_step(state, batch)
        return state, values | {"loss": np.float32(np.nan)}

    with pytest.raises(Stopped, match="the loss is nan at step 1"):
        train(config, tmp_path / "run", data, task, progress, train_step=diverging)
    assert "has diverged: " in state_of(tmp_path / "run")


def test_weights_that_are_no_numbers_are_never_stored(tmp_path, setting):
    run = tmp_path / "run"
    config, data, task, progress, train_step = setting

    def poisoned(state, batch):
        state, values = train_step(state, batch)
        if int(state.step) == 10:  # the loss was still a number
            state = state._replace(
                params=jax.tree.map(lambda x: x * jnp.nan, state.params)
            )
        return state, values

    with pytest.raises(NonFiniteLoss, match="at step 10"):
        train(config, run, data, task, progress, train_step=poisoned)
    assert steps(run) == [5]
    assert "has diverged: " in state_of(run)
    nothing = {"kernel": jnp.array([jnp.inf])}
    with pytest.raises(NonFiniteLoss, match="weights in .* are not finite"):
        checkpoints.save_model(tmp_path / "model", config, nothing, {})
    assert not (tmp_path / "model").exists()


def test_checkpoints_come_when_they_are_asked_for(tmp_path, setting):
    run = tmp_path / "run"
    cadence = Cadence(steps=2, keep=3)
    run_training(run, setting, cadence=cadence, max_steps=7)
    assert steps(run) == [5, 6, 7]
    assert "step 7 of 10" in state_of(run)
