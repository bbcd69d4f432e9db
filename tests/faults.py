"""Provokes faults and prints what became of each: ``python tests/faults.py``.

Impossible commands, damaged configurations and checkpoints, and signals. A fault is
*clean* if it ends in one message and the right exit status, *silent* if the command
succeeds as if nothing had happened, a *traceback* if it ends in one, and *lost* if a
file of the user's is gone. A damaged checkpoint is *recovered* if the previous one is
used and the user is told, and *works* if the damage does not matter. All of it takes
about three minutes of CPU time; ``--quick``, without checkpoints and signals, half a
minute.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.__main__ import main
from experiments.errors import RunError
from experiments.images.config import ImageConfig
from experiments.runs.late_reads import late_reads_ignored
from experiments.runs.stored_config import to_dict

TINY = ["--model.widths", "4", "--model.blocks", "1"]
TINY += ["--optimizer.train-targets", "k50"]
STRANGE = ("nan", "inf", "-inf", "-1", "1e400", "text", "", "2147483648", "0x10", "[]")
NUMBERS = [
    "--epochs",
    "--seed",
    "--patience",
    "--log-every",
    "--checkpoint-every",
    "--evaluate-every",
    "--label-smoothing",
    "--data.batch-size",
    "--data.shift",
    "--data.calibration",
    "--data.validation",
    "--model.patch",
    "--optimizer.rho",
    "--optimizer.learning-rate",
    "--optimizer.warmup",
    "--optimizer.momentum",
    "--optimizer.clip-norm",
    "--optimizer.ema",
    "--optimizer.accumulate",
    "--optimizer.weight-decay",
    "--save-steps",
    "--save-minutes",
    "--keep",
    "--max-steps",
    "--workers",
]
TARGETS = [
    "k",
    "k100",
    "k-1",
    "90",
    "k9x",
    "u100",
    "o100",
    "b100",
    "b90@",
    "b90@4",
    "b90@0x2",
    "5:4",
    "0:4",
    "2:",
    ":4",
    "1bit",
    "17bit",
    "bit",
    "k90+",
    "+k90",
    "k90++4bit",
    "o90+4bit",
    "dense+",
    "K90",
    "k1e1",
    "half",
    "3:7",
    "b50@64x64",
]


class Table:
    """Counts outcomes by group."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = {}
        self.bad: list[str] = []

    def add(self, group: str, outcome: str, what: str) -> None:
        """Notes an outcome; ``what`` is printed if it is not as it should be."""
        self.counts.setdefault(group, collections.Counter())[outcome] += 1
        if outcome not in ("clean", "recovered", "works"):
            self.bad.append(f"{group}: {outcome}: {what}")

    def show(self) -> None:
        """Prints the table, and every fault that was not handled."""
        names = ["cases", "clean", "recovered", "works", "silent", "traceback", "lost"]
        print("| fault |", " | ".join(names), "|")
        print("| --- |", " | ".join("---:" for _ in names), "|")
        for group, counts in self.counts.items():
            cells = [counts.total(), *(counts[name] for name in names[1:])]
            print(f"| {group} |", " | ".join(map(str, cells)), "|")
        print(*self.bad, sep="\n")


def run_command(words: list[str]) -> tuple[int | None, str]:
    """Runs a command in this process: its exit status, or None, and what it wrote."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException as error:
        return None, f"{type(error).__name__}: {error}"
    return status, out.getvalue()


def call(words: list[str]) -> tuple[str, str]:
    """Runs a command that cannot work: the outcome and what it wrote."""
    status, text = run_command(words)
    if status == 0:
        return "silent", text
    # ours, or the parser's box
    one_message = status is not None and ("error: " in text or status == 2)
    return ("clean" if one_message and "Traceback" not in text else "traceback"), text


def commands(table: Table, folder: Path) -> None:
    """Options that cannot be; ``--dry-run`` and no data keep what works cheap."""
    base = ["train", "digits", "--data-dir", str(folder / "none"), "--max-steps", "1"]
    base += ["--run", str(folder / "run"), "--model.patch", "3"]  # never fits 8x8
    for option in NUMBERS:
        for value in STRANGE:
            outcome, text = call([*base, option, value])
            # What is a possible value ends at the patch, or at the missing data.
            table.add("numbers", outcome, f"{option} {value!r}: {text[-200:]}")
    for target in TARGETS:
        for words in (
            [*base, "--optimizer.train-targets", target],
            [*base, "--eval-targets", target],
            ["evaluate", str(folder / "nowhere"), "--target", target],
            ["compress", str(folder / "nowhere"), "--target", target],
        ):
            outcome, text = call(words)
            table.add("targets", outcome, f"{words[-2:]}: {text[-200:]}")
    for name in ("a[1]", "x?", "y*", "n" * 300, "[bold]b", "two\nlines", "a\x00b"):
        for verb in (["evaluate"], ["compress", "--target", "k90"], ["report"]):
            outcome, text = call([verb[0], str(folder / name), *verb[1:]])
            table.add("names", outcome, f"{verb} {name!r}: {text[-200:]}")
        outcome, text = call([*base[:2], "--run", str(folder / name)])
        table.add("names", outcome, f"train {name!r}: {text[-200:]}")
    for recipe in ("digitz", "imagenet_", "", "-", "cifar10 ", "Digits"):
        outcome, text = call(["train", recipe])
        table.add("recipes", outcome, f"{recipe!r}: {text[-200:]}")


def configurations(table: Table, folder: Path) -> None:
    """A value of the wrong type in every field, and files that are none."""
    whole = to_dict(ImageConfig())
    paths = [(name,) for name in whole]
    paths += [
        (part, name) for part in ("optimizer", "data", "model") for name in whole[part]
    ]
    wrong: tuple[object, ...] = (None, [], {}, "text", -7, 1e999, True, [[]], "\x00")
    run = folder / "damaged"
    for path in paths:
        for value in wrong:
            values = json.loads(json.dumps(whole))
            owner = values
            for name in path[:-1]:
                owner = owner[name]
            old = owner[path[-1]]
            if type(old) is type(value) and type(value) in (str, bool):
                continue  # perhaps a good one
            if old is None and isinstance(value, str | None):
                continue
            owner[path[-1]] = value
            run.mkdir(exist_ok=True)
            (run / "config.json").write_text(json.dumps(values))
            outcome, text = call(["report", str(run)])
            if "was not evaluated" in text:
                # Possible values; an empty object has the defaults.
                outcome = "works" if value in ([], {}, -7) else "silent"
            table.add("config.json", outcome, f"{path} {value!r}: {text[-200:]}")
    for content in (b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 99_999, b"{}"):
        (run / "config.json").write_bytes(content)
        for verb in (["evaluate"], ["compress", "--target", "k90"], ["report"]):
            outcome, text = call([verb[0], str(run), *verb[1:]])
            table.add("config.json", outcome, f"{content[:9]!r}: {text[-200:]}")
        outcome, text = call(["train", "--resume", str(run)])
        table.add("config.json", outcome, f"resume {content[:9]!r}: {text[-200:]}")


def foreign(table: Table, folder: Path) -> None:
    """Directories of others that --overwrite names."""
    contents: dict[str, str | None] = {
        "a model": '{"model_type": "bert"}',
        "no object": "[]",
        "nothing": None,
        "like a run": json.dumps(to_dict(ImageConfig())),
    }
    for name, content in contents.items():
        place = folder / "foreign" / name
        place.mkdir(parents=True)
        if content is not None:
            (place / "config.json").write_text(content)
        (place / "thesis.tex").write_text("three years")
        link = folder / "foreign" / f"link to {name}"
        link.symlink_to(place)
        for target in (place, link):
            words = ["train", "digits", "--overwrite", "--run", str(target)]
            outcome, text = call(words)
            if not (place / "thesis.tex").exists():
                outcome = "lost"
            table.add("--overwrite", outcome, f"{name}: {text[-200:]}")


def checkpoints(table: Table, folder: Path, count: int) -> None:
    """Bits flipped, files cut and removed in the last of two checkpoints."""
    run = folder / "whole"
    words = ["train", "digits", "--run", str(run), "--data-dir", str(folder / "data")]
    words += ["--epochs", "2", "--checkpoint-every", "1", *TINY]
    status, text = run_command(words)
    assert status == 0, text
    like = _initial_state(run)
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    last = run / "checkpoints" / str(steps[-1])
    files = sorted(path.relative_to(run) for path in last.rglob("*") if path.is_file())
    copy = folder / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / last.name)
    states = [_restore(copy, like), _restore(run, like)]
    for number in range(count):
        shutil.rmtree(copy)
        shutil.copytree(run, copy)
        file = copy / files[number % len(files)]
        content = file.read_bytes()
        how = ("flip", "cut", "remove")[number % 3 if number >= len(files) else 0]
        if how == "remove":
            file.unlink()
        elif how == "cut" or not content:
            file.write_bytes(content[: len(content) // 2])
        else:
            place = (number * 7919) % len(content)
            flipped = bytes([content[place] ^ 1 << number % 8])
            file.write_bytes(content[:place] + flipped + content[place + 1 :])
        what = f"{how} {file.name}"
        outcome, text = _restored(copy, like, states)
        table.add("checkpoints, to resume", outcome, f"{what}: {text[-300:]}")
        outcome, text = _read(copy, states)
        table.add("checkpoints, to evaluate", outcome, f"{what}: {text[-300:]}")
        if number % 20 == 0:
            status, text = run_command(["train", "--resume", str(copy)])
            told = "resuming from the previous checkpoint" in text
            same = status == 0 and _last_metrics(copy) == _last_metrics(run)
            outcome = ("recovered" if told else "works") if same else "silent"
            if status is None or "Traceback" in text:
                outcome = "traceback"
            table.add("checkpoints, train --resume", outcome, f"{what}: {text[-300:]}")


def _initial_state(run: Path) -> Any:
    """The state before the first step: what a checkpoint has to look like."""
    from experiments.evaluation.open_run import stored_data_dir
    from experiments.kinds import prepare
    from experiments.runs.directory import load_config
    from experiments.training.step import init_state

    config = load_config(run)
    return init_state(config, *prepare(config, stored_data_dir(run)))


def _restore(run: Path, like: Any, say: Callable[[str], None] = print) -> Any:
    from experiments.runs.checkpoints import manager, restore

    with manager(run) as saved:
        return restore(saved, like, say)


def _restored(run: Path, like: Any, states: list[Any]) -> tuple[str, str]:
    """What comes of restoring a damaged run, whose undamaged states are these."""
    said: list[str] = []
    try:
        state = _restore(run, like, said.append)
    except RunError as error:
        return "clean", str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return _outcome([_equal(state, whole) for whole in states], said)


def _read(run: Path, states: list[Any]) -> tuple[str, str]:
    """The same of reading the model only."""
    from experiments.runs.checkpoints import read_model

    said: list[str] = []
    try:
        model = read_model(run, said.append)
    except RunError as error:
        return "clean", str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    whole = [(state.params, state.batch_stats) for state in states]
    return _outcome([_equal(model, each) for each in whole], said)


def _outcome(equal: list[bool], said: list[str]) -> tuple[str, str]:
    """Judges what was read: the last state, or the one before and a word about it."""
    before, last = equal
    if last:
        return "works", ""
    return ("recovered" if before and said else "silent"), "\n".join(said)


def _equal(one: Any, other: Any) -> bool:
    """Whether two trees hold the same numbers."""
    import jax
    import numpy as np

    def numbers(tree: Any) -> list[Any]:
        return [
            np.asarray(
                jax.random.key_data(leaf)
                if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else leaf
            )
            for leaf in jax.tree.leaves(tree)
        ]

    pairs = zip(numbers(one), numbers(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def _last_metrics(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()[-2:]


def signals(table: Table, folder: Path) -> None:
    """A signal after some steps; the checkpoint is there, and training resumes."""
    from experiments.runs.checkpoints import latest_step

    for number in (signal.SIGTERM, signal.SIGINT):
        for lines in range(10):
            run = folder / f"stopped{number}-{lines}"
            words = ["train", "digits", "--run", str(run), "--epochs", "500"]
            words += ["--data-dir", str(folder / "data"), "--log-every", "1", *TINY]
            with _signal_after(run, lines, number):
                status, text = run_command(words)
            step = latest_step(run)
            told = re.search(r"stopped at step (\d+) of", text)
            good = status == 128 + number
            if lines or told:  # else it came before the first step was compiled
                good &= told is not None and int(told[1]) == step and "--resume" in text
            if good and lines % 5 == 0:
                further = str((step or 0) + 1)
                words = ["train", "--resume", str(run), "--max-steps", further]
                good = run_command(words)[0] == 0 and latest_step(run) == int(further)
            outcome = "clean" if good else "lost" if step is None else "traceback"
            table.add("signals", outcome, f"{number}, {lines}: {status} {text[-300:]}")


@contextlib.contextmanager
def _signal_after(run: Path, lines: int, number: int) -> Any:
    """Sends this process a signal when a run has logged so many lines."""
    ended = threading.Event()

    def send() -> None:
        path = run / "metrics.jsonl" if lines else run / "config.json"
        while not ended.wait(0.002):
            if path.exists() and path.read_text().count("\n") >= lines:
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


GROUPS: dict[str, Callable[..., None]] = {
    "commands": commands,
    "configurations": configurations,
    "foreign": foreign,
    "checkpoints": checkpoints,
    "signals": signals,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="one of these: " + " ".join(GROUPS))
    parser.add_argument("--checkpoints", type=int, default=140, help="to damage")
    options = parser.parse_args()
    found = Table()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        for group, provoke in GROUPS.items():
            slow = group in ("checkpoints", "signals")
            if options.only not in (None, group) or (slow and options.quick):
                continue
            arguments = (options.checkpoints,) if group == "checkpoints" else ()
            with late_reads_ignored():
                provoke(found, Path(name), *arguments)
    found.show()
