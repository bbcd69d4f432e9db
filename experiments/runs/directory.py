"""A run's directory: what it holds, who may write it, and what may be removed."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cram_jax.writing import replacing
from experiments.config import AnyConfig, RunConfig
from experiments.errors import (
    ConfigError,
    RunError,
    cannot_write,
    command_line,
    first_line,
)
from experiments.kinds import kind_of
from experiments.runs.stored_config import from_dict, to_dict

# What a run leaves in its directory; anything else there belongs to somebody else.
OURS = (
    "config.json",
    "status.json",
    "metrics.jsonl",
    "events.out.tfevents.*",
    "checkpoints",
    "model",
    "best",
    "compressed",
    "compression.json",
    "evaluation.json",
    "evaluation.*.json",  # of other models, and of targets so far
    "audit.json",
    "allocation-*.json",
    "tradeoff.*",
    "vocabulary",
    ".*.part*",  # of a process that was killed while it wrote
    ".lock",
)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and replaces an earlier one only then.

    Raises:
      RunError: it cannot be written; the message says why.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def reading(path: Path, advice: str = "") -> Iterator[None]:
    """Whatever fails inside becomes a RunError that names the file and the advice."""
    try:
        yield
    except Exception as error:  # of json, of tensorstore or of orbax
        raise RunError(f"cannot read {path}: {first_line(error)}{advice}") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      RunError: it cannot be read; the message says why.
    """
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def save_config(run: Path, config: RunConfig) -> None:
    """Writes ``config.json``.

    Raises:
      RunError: it cannot be written.
    """
    write_text(run / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def starting_from(config: AnyConfig, run: Path) -> AnyConfig:
    """The configuration, on the data and from the network and weights of a run.

    Args:
      config: for example a recipe.
      run: the directory of a run of the same kind.

    Raises:
      ConfigError: the run is of another kind.
      RunError: it is not the directory of a run.
    """
    theirs = load_config(run)
    if theirs.kind != config.kind:
        raise ConfigError(
            f"init_from must be a run on {config.kind}, got {run}, on {theirs.kind}"
        )
    theirs = kind_of(theirs).kept_sources(theirs, run)
    names = ("data", "model", "train_file", "eval_file", "vocabulary")
    own = {name: getattr(theirs, name) for name in names if hasattr(theirs, name)}
    return dataclasses.replace(config, init_from=str(run), **own)


def load_config(run: Path) -> Any:
    """Reads ``config.json``.

    Raises:
      RunError: there is none, it is damaged, or it is not that of a run.
    """
    path = run / "config.json"
    if not os.path.exists(path):  # False also for a name that is too long
        raise RunError(f"{run} is not a run: it has no config.json")
    values = read_json(path)
    with reading(path):
        needed = ("name", "optimizer", "epochs", "seed", "data", "model")
        missing = [name for name in needed if name not in values]
        if missing:
            raise RunError(f"it is not that of a run: it lacks {missing[0]}")
        for part in ("optimizer", "data", "model"):
            if not values[part]:
                raise RunError(f"its {part} is empty")
        return from_dict(values)


def check_resumable(run: Path) -> None:
    """Raises if a directory holds only a model that was made from a run.

    Training there would start at random weights, and its result would not be read.

    Raises:
      RunError: see above, or the directory is not a run.
    """
    load_config(run)
    was_trained = "state" in read_status(run) or any((run / "checkpoints").glob("*"))
    if (run / "model").exists() and not was_trained:
        start = ("--config", run / "config.json", "--init-from", run)
        again = command_line("train", *start, *_own_code(run, "--model.module"))
        raise RunError(
            f"{run} holds a model without the state of its training: train a new run "
            f"from it with\n  {again}"
        )


def resume_command(run: Path) -> str:
    """What resumes a run."""
    return command_line("train", "--resume", run, *_own_code(run, "--model.module"))


def evaluate_command(run: Path) -> str:
    """What evaluates a run."""
    return command_line("evaluate", run, *_own_code(run, "--module"))


def _own_code(run: Path, option: str) -> tuple[str, ...]:
    """Code of a user's own runs only if they name it in the command."""
    try:
        name = getattr(load_config(run).model, "module", "")
    except RunError:
        return ()
    return (option, name) if name else ()


def write_status(run: Path, **values: Any) -> None:
    """Updates ``status.json``: how far a run is, and where its data are."""
    write_text(
        run / "status.json", json.dumps(read_status(run) | values, indent=2) + "\n"
    )


def read_status(run: Path) -> dict[str, Any]:
    """The contents of ``status.json``; empty if it is missing or damaged."""
    with contextlib.suppress(RunError):
        values = read_json(run / "status.json")
        if isinstance(values, dict):
            return values
    return {}


def state_of(run: Path) -> str:
    """Says why a run did not finish; empty if it did."""
    status = read_status(run)
    step, steps = status.get("step", "?"), status.get("steps", "?")
    match status.get("state"):
        case "diverged":
            return f"{run} has diverged: {status.get('why', '')}"
        case "training" | "interrupted":
            return (
                f"{run} is unfinished: its last checkpoint is at step {step} of {steps}"
            )
    return ""


@contextlib.contextmanager
def locked(run: Path, *, waits: bool = False) -> Iterator[None]:
    """Keeps other processes from writing a run while this one does.

    Args:
      run: the directory.
      waits: whether to wait for another process that is writing it.

    Raises:
      RunError: another process is writing it, or the directory cannot be made.
    """
    path = run / ".lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise cannot_write(run, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunError(
                    f"another process is writing {run}; wait for it, or choose another "
                    f"directory"
                ) from error
            # A file system without locks: nobody can be kept out.
        yield


def move_aside(path: Path) -> Path:
    """Renames a file or a directory, so that it stays; returns its new name."""
    ending = "" if path.is_dir() else path.suffix
    stem, number = path.name.removesuffix(ending), 1
    while (aside := path.with_name(f"{stem}.{number}{ending}")).exists():
        number += 1
    return path.rename(aside)


def check_path(run: Path) -> None:
    """Raises if checkpoints would not be found again under a path.

    Raises:
      RunError: it has characters that Orbax reads as patterns, or is too long.
    """
    path = str(run.absolute())
    if wrong := sorted(set(path) & set("[]*?")):
        raise RunError(
            f"{run} cannot be the directory of a run: Orbax finds no checkpoints "
            f"under a path with {wrong[0]!r}"
        )
    if not path.isprintable():
        raise RunError(
            f"{str(run)!r} cannot be the directory of a run: control characters"
        )
    if len(run.name.encode()) > 255 or len(path.encode()) > 3800:
        raise RunError(f"{run.name[:40]}... is too long for the name of a directory")


def check_output(file: Path, suffix: str, own: str = "") -> None:
    """Raises unless results may be written to a file, which may exist.

    Args:
      file: where they go.
      suffix: which its name must have.
      own: the names under which a run keeps such results, as a pattern.

    Raises:
      ConfigError: the suffix is another, or a run keeps something else there.
      RunError: see `check_path`.
    """
    if file.suffix != suffix:
        raise ConfigError(f"out must be a file ending in {suffix}, got {file}")
    check_path(file)
    if file.exists() and _matches(file, *OURS) and not (own and file.match(own)):
        raise ConfigError(f"out must not be a file that a run keeps, got {file}")


def compressed_to(run: Path) -> str:
    """The target that the model of a run was compressed to; empty if it was not.

    Raises:
      RunError: the file that says so cannot be read.
    """
    path = run / "compression.json"
    return str(read_json(path)["target"]) if path.exists() else ""


def check_free(run: Path, *, overwrite: bool) -> None:
    """Raises unless a new run may have a directory.

    Args:
      run: the directory, which need not exist.
      overwrite: whether an existing run of ours may be removed.

    Raises:
      RunError: it holds anything else, is a file, or is a symbolic link.
    """
    if not os.path.lexists(run):
        return
    if overwrite and run.is_symlink():
        raise RunError(f"{run} is a symbolic link; nothing is removed through one")
    if not run.is_dir():
        raise RunError(f"cannot write {run}: it is not a directory")
    there = sorted(path for path in run.iterdir() if path.name != ".lock")
    if not there:
        return
    if not overwrite:
        raise RunError(
            f"{run} is not empty: choose another --run, start over with --overwrite, "
            f"or resume it with\n  {resume_command(run)}"
        )
    try:
        load_config(run)
    except RunError as error:
        raise RunError(
            f"{run} is not a run of ours, remove it yourself: {error}"
        ) from error
    with reading(run):
        foreign = next(_foreign(run), None)
    if foreign:
        raise RunError(
            f"{run} holds {str(foreign.relative_to(run))!r}, which no run wrote: move "
            f"it, or choose another --run"
        )


def _foreign(run: Path) -> Iterator[Path]:
    """What no run wrote, in a run's directory and in those of the runs inside it.

    Links are removed and not followed. A checkpoint and a vocabulary may hold files of
    any name.
    """
    for path in sorted(run.iterdir()):
        if not _matches(path, *OURS):
            yield path
        elif path.is_symlink() or not path.is_dir():
            continue
        elif path.name == "best":
            yield from _foreign(path)
        elif path.name == "compressed":
            for model in sorted(path.iterdir()):
                is_run = model.is_dir() and not model.is_symlink()
                yield from _foreign(model) if is_run else [model]
        elif path.name == "checkpoints":
            yield from (p for p in sorted(path.iterdir()) if not _is_step(p))
        elif not _matches(path, "model", "vocabulary", ".*.part*"):
            yield path


def _is_step(path: Path) -> bool:
    """Whether it is named as a checkpoint is, or as an unfinished one."""
    return path.name.split(".orbax-checkpoint-tmp")[0].isdecimal()


def _matches(path: Path, *names: str) -> bool:
    return any(path.match(name) for name in names)


def move(source: Path, run: Path) -> None:
    """Moves everything in a directory into one that is empty or does not exist.

    Raises:
      RunError: it cannot be written.
    """
    try:
        run.mkdir(exist_ok=True)
        for path in source.iterdir():
            path.rename(run / path.name)
    except OSError as error:
        raise cannot_write(run, error) from error


def clear(run: Path) -> None:
    """Removes what `check_free` allowed, except for the lock.

    Raises:
      RunError: it cannot be removed.
    """
    try:
        # The configuration goes last: until then a second try recognises the run.
        for path in sorted(run.iterdir(), key=lambda path: path.name == "config.json"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
    except OSError as error:
        raise cannot_write(run, error) from error
