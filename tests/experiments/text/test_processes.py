"""A network on text that two processes train and judge together."""

import json
import os
import socket
import subprocess
import sys

import pytest

OPTIONS = (
    "--weights None --model.num-hidden-layers 1 --model.hidden-size 16 "
    "--model.num-attention-heads 2 --model.intermediate-size 32 "
    "--model.vocab-size 128 --data.max-length 48 --data.stride 8 "
    "--data.question-limit 12 --data.batch-size 8 --data.evaluation-examples 5 "
    "--optimizer.train-targets u50 --epochs 3 --patience 1 --evaluate-every 1"
)


def train(run, arguments, processes):
    """Trains, and gives the run's evaluations in their order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments", "train", "squad_small"]
    command += ["--run", str(run), *OPTIONS.split(), *arguments]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(4 // processes),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    started = [
        subprocess.Popen(
            [*command, "--mesh", "data=2,fsdp=2", "--process", str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]
    for process in started:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    stored = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in stored if "eval_f1" in line]


@pytest.mark.nightly
def test_two_processes_judge_and_stop_as_one_does(facts, text_config, tmp_path):
    places = ["--train-file", str(facts), "--eval-file", str(facts)]
    places += ["--vocabulary", text_config.vocabulary]
    one = train(tmp_path / "one", places, 1)
    two = train(tmp_path / "two", places, 2)
    assert len(one) == len(two) < 3  # no better for once, and so stopped early
    for ours, theirs in zip(two, one, strict=True):
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)
        assert ours["eval_f1"] == theirs["eval_f1"]
