"""Claims a directory for a run, a new one or one that resumes."""

import contextlib
from pathlib import Path
from typing import get_args

from experiments.config import GradientRule, RunConfig
from experiments.errors import RunError
from experiments.kinds import kind_of
from experiments.metrics import Report
from experiments.run_directory import (
    check_free,
    check_path,
    clear,
    load_config,
    locked,
    save_config,
)
from experiments.sharding import on_first_process
from experiments.stored_config import differences


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
            load_config(run)  # raises, so that no lock is left where there is no run
        stack.enter_context(locked(run))
        if resume:
            _take_up(run, config, report)
            return
        check_free(run, overwrite=overwrite)  # another process may have been faster
        clear(run)
        save_config(run, config)
        kind_of(config).keep_sources(config, run)

    on_first_process(take)


def _take_up(run: Path, config: RunConfig, report: Report) -> None:
    """Checks that a configuration matches the stored one, or adds epochs to it."""
    stored = load_config(run)
    changed = differences(config, stored)
    if not changed:
        return
    rule = config.optimizer
    extended = [*changed] == ["epochs"] and config.epochs > stored.epochs
    is_constant = rule.schedule == "constant" and not rule.warmup
    if extended and is_constant and rule.rule in get_args(GradientRule):
        save_config(run, config)
        report.say(f"{run}: {config.epochs} epochs instead of {stored.epochs}")
        return
    advice = "resume it with the configuration in its config.json"
    if extended:
        rules = ", ".join(get_args(GradientRule))
        advice = (
            f"it is scheduled for {stored.epochs} epochs (only {rules} with a constant "
            f"learning rate and no warm-up take more); train a new run from it with "
            f"--init-from {run}"
        )
    raise RunError(f"{run} was started with a different {', '.join(changed)}; {advice}")
