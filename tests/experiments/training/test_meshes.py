"""Runs on several devices."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.__main__ import main
from experiments.commands import lottery as command
from experiments.commands import train as train_command
from experiments.errors import ConfigError
from experiments.runs.directory import load_config
from experiments.runs.metrics import make_console, progress_bar
from experiments.sharding import join_processes, make_mesh, state_shardings
from experiments.training.loop import train
from experiments.training.step import init_state, make_train_step

pytestmark = [
    pytest.mark.several_devices,
    pytest.mark.usefixtures("quick_compilation"),
]


@pytest.fixture(scope="module")
def one_target(with_method):
    """CrAM+ for one target: half as much to compile for each mesh."""
    return with_method("cram_plus", train_targets=("k50",))


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory, one_target, data, task, quiet):
    return train(one_target, tmp_path_factory.mktemp("one") / "run", data, task, quiet)


@pytest.fixture(scope="module")
def quiet():
    with progress_bar(make_console()) as bar:
        yield bar


def assert_close(state, other):
    for one, two in zip(
        jax.tree.leaves((state.params, state.batch_stats)),
        jax.tree.leaves((other.params, other.batch_stats)),
        strict=True,
    ):
        # Sums over devices round otherwise, and ten steps amplify it.
        np.testing.assert_allclose(one, two, rtol=2e-2, atol=2e-3)


def test_a_run_on_a_mesh_goes_on_on_another(
    tmp_path, on_one_device, one_target, data, task, quiet
):
    first = make_mesh("data=4,fsdp=2", one_target.data.batch_size)
    state = train(one_target, tmp_path / "run", data, task, quiet, mesh=first)
    assert_close(state, on_one_device)
    kernel = state.params["stage2_block1"]["conv1"]["kernel"]
    assert kernel.sharding.spec == P(None, None, None, "fsdp")
    assert state.opt_state[2][0].trace["head"]["kernel"].sharding.spec[0] == "fsdp"

    # From the first of two checkpoints, on half as many devices.
    steps = tmp_path / "run" / "checkpoints"
    last = max(steps.iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(last)
    second = make_mesh("fsdp=4", one_target.data.batch_size)
    again = train(
        one_target, tmp_path / "run", data, task, quiet, mesh=second, resume=True
    )
    assert int(again.step) == int(state.step)
    assert len(again.params["head"]["kernel"].sharding.device_set) == 4
    assert_close(again, on_one_device)


@pytest.mark.nightly
def test_lottery_tickets_are_found_on_a_mesh(
    tmp_path, with_method, data, task, monkeypatch
):
    devices = []

    def watched(*arguments, **options):
        state = train(*arguments, **options)
        devices.append(len(state.params["head"]["kernel"].sharding.device_set))
        return state

    monkeypatch.setattr(command, "prepare", lambda config, data_dir: (data, task))
    monkeypatch.setattr(command, "train", watched)
    plan = command.Plan(1, 0.5, 3, "global")
    command.lottery(with_method("none"), plan, tmp_path, None, mesh="data=2,fsdp=2")
    assert devices == [4, 4, 4]  # to the step that is rewound to, and two rounds
    rounds = json.loads((tmp_path / "lottery.json").read_text())["rounds"]
    dense, ticket = (found["zeros"] for found in rounds)
    assert dense == 0
    assert ticket == pytest.approx(0.5, abs=1e-3)


def test_a_step_puts_the_state_where_it_belongs(one_target, data, task):
    """From every device, as a state lies that was made without a mesh."""
    mesh = make_mesh("fsdp=8", one_target.data.batch_size)
    state = init_state(one_target, data, task)
    shardings = state_shardings(mesh, state)
    step = make_train_step(one_target, data, task, mesh)
    everywhere = jax.device_put(state, NamedSharding(mesh, P()))
    after, _ = step(everywhere, data.train.take(range(8)))
    chex.assert_trees_all_equal(
        jax.tree.map(
            lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim),
            after,
            shardings,
        ),
        jax.tree.map(lambda leaf: True, shardings),
    )


@pytest.mark.parametrize(
    ("mesh", "match"),
    [
        ("data", "mesh must be sizes of data and fsdp, such as data=4,fsdp=2, got"),
        ("model=2", "mesh must be sizes of data and fsdp"),
        ("data=0", "mesh must be sizes of data and fsdp"),
        ("data=2,fsdp=x", "mesh must be sizes of data and fsdp"),
        ("data=16", "mesh data=16 needs 16 devices, there are 8"),
        ("data=3", "mesh data=3 must divide the global batch_size=8, got 3 devices"),
    ],
)
def test_wrong_meshes_are_refused(mesh, match):
    with pytest.raises(ConfigError, match=match):
        make_mesh(mesh, 8)


def test_the_command_line_takes_a_mesh(tmp_path, capsys, monkeypatch):
    options = (
        "--epochs 1 --model.widths 4 --model.blocks 1 --optimizer.train-targets k50"
    )
    command = f"train digits --run {tmp_path / 'run'} --data-dir {tmp_path} {options}"
    assert main([*command.split(), "--mesh", "data=8"]) == 0
    assert "20 steps" in capsys.readouterr().out
    assert load_config(tmp_path / "run").epochs == 1
    assert main([*command.split(), "--mesh", "data=7", "--overwrite"]) == 1
    assert "must divide the global batch_size=64" in capsys.readouterr().err

    made = []

    def recorded(config, data, task, mesh, teacher):
        made.append(dict(mesh.shape))
        return make_train_step(config, data, task, mesh, teacher)

    monkeypatch.setattr(train_command, "make_train_step", recorded)
    assert main([*command.split(), "--mesh", "data=2,fsdp=4", "--dry-run"]) == 0
    assert made == [{"data": 2, "fsdp": 4}]
    assert "one step: loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("host:1", None, None), "coordinator, processes and process together, or"),
        ((None, 2, 0), "coordinator, processes and process together, or none"),
        (("host:1", 2, 2), "0 <= process < processes, got .*process=2"),
        (("host:1", 2, -1), "0 <= process < processes"),
        (("auto", 2, 0), "neither processes nor process, got coordinator=auto"),
    ],
)
def test_processes_that_do_not_fit_together_are_refused(arguments, expected):
    with pytest.raises(ConfigError, match=f"expected {expected}"):
        join_processes(*arguments)


def test_a_process_that_works_alone_joins_nothing():
    join_processes(None, None, None)
    assert jax.process_count() == 1
    assert make_mesh(None, 8) is None


def test_the_command_line_says_what_does_not_fit(capsys):
    command = "train digits --coordinator no-such-host:1 --processes 1 --process 7"
    assert main(command.split()) == 1
    assert "coordinator=no-such-host:1" in capsys.readouterr().err
