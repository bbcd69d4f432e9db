"""Processes that are killed at random moments, and resumed.

A few kills by default; for more:
``pytest tests/experiments/training/test_interruption.py --kills 20``.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.images.data import load
from experiments.images.task import classification
from experiments.runs import checkpoints
from experiments.runs.directory import load_config
from experiments.training.step import init_state

OPTIONS = (
    "--model.widths 4 --model.blocks 1 --optimizer.train-targets k50 2:4 "
    "--checkpoint-every 1 --evaluate-every 0 --log-every 1"
)


class Training:
    """A run on one process or on several, two devices each."""

    def __init__(self, run, data_dir, epochs, processes=1):
        self.run, self.data_dir, self.processes = run, data_dir, processes
        self.log = run.with_suffix(".log")
        self.options = ["--epochs", str(epochs), *OPTIONS.split()]

    def start(self, resume=False):
        command = [sys.executable, "-m", "experiments", "train"]
        if resume:
            command += ["--resume", str(self.run)]
        else:
            places = ["--run", str(self.run), "--data-dir", str(self.data_dir)]
            command += ["digits", *places, *self.options]
        if self.processes == 1:
            return [self.launch(command)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["--coordinator", f"127.0.0.1:{port}", "--mesh", "data=2,fsdp=2"]
        command += ["--processes", str(self.processes)]
        return [
            self.launch([*command, "--process", str(index)])
            for index in range(self.processes)
        ]

    def launch(self, command):
        with self.log.open("a") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ
                | {
                    "JAX_NUM_CPU_DEVICES": "2",
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                },
            )

    def finish(self, resume=False):
        for process in self.start(resume):
            assert process.wait(timeout=600) == 0, self.log.read_text()

    def kill(self, processes, victim):
        processes[victim].kill()
        assert processes[victim].wait() == -signal.SIGKILL
        for process in processes:  # what a launcher does when one has died
            process.kill()
            process.wait()

    def lines(self):
        """How many steps metrics.jsonl tells of."""
        path = self.run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def state(self):
        """The last checkpoint, read by this process."""
        config = load_config(self.run)
        data = load(config.data, self.data_dir)
        like = init_state(config, data, classification(config, data))
        with checkpoints.manager(self.run) as manager:
            state = checkpoints.restore(manager, like)
        return jax.tree.map(
            lambda leaf: np.asarray(
                jax.random.key_data(leaf) if "key" in str(leaf.dtype) else leaf
            ),
            state,
        )


def wait_for_steps(training, processes, count):
    """Until the run has written down so many, and one of them just now."""
    before, deadline = training.lines(), time.monotonic() + 600
    # A resumed run drops the lines behind its checkpoint.
    while training.lines() < max(count, 1) or training.lines() == before:
        for process in processes:
            assert process.poll() is None, training.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.nightly
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_again_and_again_equals_an_undisturbed_one(
    processes, tmp_path, request
):
    kills = request.config.getoption("kills")
    epochs = 1 + kills  # of 20 steps, with a checkpoint after each
    generator = np.random.default_rng(processes)
    undisturbed = Training(tmp_path / "whole", tmp_path, epochs, processes)
    undisturbed.finish()

    killed = Training(tmp_path / "killed", tmp_path, epochs, processes)
    reached = []
    for index in range(kills):
        started = killed.start(resume=index > 0)
        wait_for_steps(killed, started, 20 * index + generator.integers(1, 20))
        time.sleep(generator.uniform(0, 0.05))
        killed.kill(started, generator.integers(processes))
        if any((killed.run / "checkpoints").glob("[0-9]*[0-9]")):
            reached.append(int(killed.state().step))
    print(f"killed after the checkpoints of steps {reached}")
    killed.finish(resume=True)
    for one, other in zip(
        jax.tree.leaves(killed.state()),
        jax.tree.leaves(undisturbed.state()),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
