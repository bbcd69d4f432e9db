"""Provokes faults and prints what became of each: ``python tests/faults.py``.

Commands that cannot work, configurations, metrics and checkpoints that are damaged, and
signals. A fault is *clean* if it ends in one message and the right exit status,
*silent* if a command succeeds as if nothing had happened, a *traceback* if it ends in
one, and *lost* if a file of the user's is gone; a damaged checkpoint is *recovered* if
the run went on from the one before and said so, and *works* if the damage did not
matter. It takes some minutes; ``--quick`` leaves out the checkpoints and the signals,
and takes half a minute of CPU time.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.__main__ import main
from experiments.images.config import ImageConfig
from experiments.stored_config import to_dict

TINY = "--epochs 2 --model.widths 4 --model.blocks 1 --optimizer.train-targets k50"
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


def call(words: list[str]) -> tuple[str, str]:
    """Runs a command in this process: its outcome and what it wrote."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    text = out.getvalue()
    if status == 0:
        return "silent", text
    one_line = "error: " in text or status == 2  # ours, or the parser's box
    return ("clean" if one_line and "Traceback" not in text else "traceback"), text


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
    run, data = folder / "whole", folder / "data"
    words = ["train", "digits", "--run", str(run), "--data-dir", str(data)]
    outcome, text = call([*words, *TINY.split(), "--checkpoint-every", "1"])
    assert outcome == "silent", text
    last = max((run / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    files = sorted(p.relative_to(run) for p in last.rglob("*") if p.is_file())
    for number in range(count):
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
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
        words = ["train", "--resume", str(copy), "--epochs", "2"]
        outcome, text = call(words)
        told = "going on from the checkpoint before" in text
        if outcome == "silent":
            same = _same(copy, run)
            outcome = "recovered" if told and same else "works" if same else "silent"
        table.add("checkpoints", outcome, f"{how} {file.name}: {text[-300:]}")


def _same(one: Path, other: Path) -> bool:
    """Whether two runs ended in the same loss and accuracy."""
    last = [
        (run / "metrics.jsonl").read_text().splitlines()[-2:] for run in (one, other)
    ]
    return last[0] == last[1]


def signals(table: Table, folder: Path) -> None:
    """A signal at several moments; the run goes on afterwards."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for number in (signal.SIGTERM, signal.SIGINT):
        for index, lines in enumerate((1, 5)):
            run = folder / f"stopped{number}-{index}"
            words = ["train", "digits", "--run", str(run), "--epochs", "500"]
            words += ["--data-dir", str(folder / "data"), "--log-every", "1"]
            words += TINY.split()[2:]
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments", *words],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in _lines(run, lines, process):
                time.sleep(0.05)
            process.send_signal(number)
            text, _ = process.communicate(timeout=300)
            good = process.returncode == 128 + number and "--resume" in text
            if good:
                words = ["train", "--resume", str(run), "--max-steps", "1"]
                good = call(words)[0] == "silent"
            outcome = "clean" if good else "traceback"
            table.add(
                "signals", outcome, f"{number}: {process.returncode} {text[-300:]}"
            )


def _lines(run: Path, count: int, process: "subprocess.Popen[str]") -> Iterator[None]:
    """Yields until a run has written so many lines."""
    path = run / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        yield


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
    parser.add_argument("--checkpoints", type=int, default=60, help="to damage")
    options = parser.parse_args()
    found = Table()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        for group, provoke in GROUPS.items():
            slow = group in ("checkpoints", "signals")
            if options.only not in (None, group) or (slow and options.quick):
                continue
            arguments = (options.checkpoints,) if group == "checkpoints" else ()
            provoke(found, Path(name), *arguments)
    found.show()
