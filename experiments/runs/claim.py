"""Claims a directory for a run, a new one or one that resumes."""

import contextlib
from pathlib import Path
from typing import get_args

from experiments.config import GradientRule, RunConfig
from experiments.errors import ConfigError, RunError
from experiments.kinds import kind_of
from experiments.runs.directory import (
    check_free,
    check_path,
    check_resumable,
    clear,
    load_config,
    locked,
    read_status,
    save_config,
)
from experiments.runs.metrics import Report
from experiments.runs.stored_config import differences
from experiments.sharding import on_first_process


def claim(
    stack: contextlib.ExitStack,
    run: Path,
    config: RunConfig,
    report: Report,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Claims a directory for this run, and locks others out while it is written."""

    def take() -> None:
        check_path(run)
        if not resume:
            check_free(run, overwrite=overwrite)
        else:
            check_resumable(run)  # before a lock is left there
        stack.enter_context(locked(run))
        if resume:
            _take_up(run, config, report)
            return
        check_free(run, overwrite=overwrite)  # another process may have been faster
        _check_sources(run, config)
        clear(run)
        save_config(run, config)
        kind_of(config).keep_sources(config, run)

    on_first_process(take)


def _check_sources(run: Path, config: RunConfig) -> None:
    """Raises if a run would remove what it starts or learns from.

    A resumed run needs its teacher, and one without a checkpoint its start.

    Raises:
      ConfigError: the message names the field.
    """
    for name in ("init_from", "teacher"):
        source = getattr(config, name)
        place = Path(source or "").resolve()
        if source and run.resolve() in (place, *place.parents) and place.exists():
            raise ConfigError(
                f"{name} must be outside of {run}, which is removed first, got "
                f"{source}; choose another --run"
            )


def _take_up(run: Path, config: RunConfig, report: Report) -> None:
    """Checks that a configuration matches the stored one, or only trains for longer."""
    stored = load_config(run)
    changed = differences(config, stored)
    if not changed:
        return
    advice = "resume it with the configuration in its config.json"
    if all(_has_grown(name, config, stored) for name in changed):
        if "epochs" not in changed or _takes_epochs(config):
            _check_goes_on(run, config, stored)
            save_config(run, config)
            for name in changed:
                now, before = getattr(config, name), getattr(stored, name)
                number = f"{now} epochs" if name == "epochs" else f"{name} {now}"
                report.say(f"{run}: {number} instead of {before}")
            return
        rules = ", ".join(get_args(GradientRule))
        advice = (
            f"it is scheduled for {stored.epochs} epochs (only {rules} with a constant "
            f"learning rate and no warm-up take more); train a new run from it with "
            f"--init-from {run}"
        )
    raise RunError(f"{run} was started with a different {', '.join(changed)}; {advice}")


def _has_grown(name: str, config: RunConfig, stored: RunConfig) -> bool:
    """Whether a run that resumes only goes on for longer, by one of its fields."""
    # Without patience the best model is stored elsewhere.
    return name in ("epochs", "patience") and (
        0 < getattr(stored, name) < getattr(config, name)
    )


def _takes_epochs(config: RunConfig) -> bool:
    """Whether no step depends on how many there are."""
    rule = config.optimizer
    is_constant = rule.schedule == "constant" and not rule.warmup
    return is_constant and rule.rule in get_args(GradientRule)


def _check_goes_on(run: Path, config: RunConfig, stored: RunConfig) -> None:
    """Raises if a run has stopped early and would do so again."""
    status = read_status(run)
    step, steps = status.get("step", 0), status.get("steps", 0)
    stopped = status.get("state") == "finished" and step < steps
    if stopped and config.patience == stored.patience:
        raise RunError(
            f"{run} stopped early, at step {step} of {steps}, by patience="
            f"{stored.patience}: epochs={config.epochs} would not take it further; "
            f"resume it with a larger --patience"
        )
