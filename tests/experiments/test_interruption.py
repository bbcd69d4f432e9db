"""A process that is killed, and the one that goes on."""

import signal
import subprocess
import sys
import time

import jax
import numpy as np

from experiments import checkpoints
from experiments.data.images import load
from experiments.tasks.classification import classification
from experiments.training import init_state

OPTIONS = (
    "--epochs 6 --model.widths 4 --model.blocks 1 --optimizer.targets k50 2:4 "
    "--checkpoint-every 1 --evaluate-every 0"
)


def start(run, data_dir, *options):
    command = [sys.executable, "-m", "experiments", "train", "digits"]
    places = ["--run", str(run), "--data-dir", str(data_dir)]
    return subprocess.Popen(
        [*command, *places, *OPTIONS.split(), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def leaves(run, data_dir):
    config = checkpoints.load_config(run)
    data = load(config.data, data_dir)
    like = init_state(config, data, classification(config, data))
    with checkpoints.manager(run) as manager:
        state = checkpoints.restore(manager, like)
    return [
        np.asarray(jax.random.key_data(leaf) if "key" in str(leaf.dtype) else leaf)
        for leaf in jax.tree.leaves(state)
    ]


def test_a_killed_run_that_is_resumed_equals_an_undisturbed_one(tmp_path):
    undisturbed = start(tmp_path / "whole", tmp_path)
    finish(undisturbed)

    killed = start(tmp_path / "killed", tmp_path)
    steps = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 300
    while not any(p.name.isdecimal() for p in steps.glob("*")):
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    finish(start(tmp_path / "killed", tmp_path, "--resume"))

    for one, other in zip(
        leaves(tmp_path / "killed", tmp_path),
        leaves(tmp_path / "whole", tmp_path),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
