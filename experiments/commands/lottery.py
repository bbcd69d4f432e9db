"""Finds lottery tickets: a whole training for each of several sparsities."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich import box
from rich.table import Table

from cram_jax import KeepPrunedState
from experiments.config import RunConfig
from experiments.datasets import data_dir_note
from experiments.errors import ConfigError, RunError, Stopped
from experiments.kinds import kind_of, prepare
from experiments.methods.lottery import lottery_tickets
from experiments.runs import checkpoints
from experiments.runs.directory import (
    check_path,
    load_config,
    locked,
    read_json,
    reading,
    save_config,
    write_text,
)
from experiments.runs.metrics import make_console, progress_bar
from experiments.runs.stored_config import differences, from_dict, to_dict
from experiments.sharding import make_mesh
from experiments.training.distillation import check_teacher, load_teacher
from experiments.training.loop import train
from experiments.training.step import (
    TrainState,
    init_state,
    make_train_step,
    total_steps,
)
from experiments.training.warm_start import check_source, initial_model

RESULTS = "lottery.json"


class Plan(NamedTuple):
    """What a lottery does beside training.

    Attributes:
      rounds: how often it prunes.
      share: of the weights that are left, what a round prunes.
      rewind_step: the step of the dense training that rounds go back to.
      scope: whether weights are compared over all layers or in each.
    """

    rounds: int
    share: float
    rewind_step: int
    scope: Literal["global", "layer"]

    def stored(self) -> dict[str, Any]:
        """What another number of rounds does not change."""
        return {n: value for n, value in self._asdict().items() if n != "rounds"}


def lottery(
    config: RunConfig,
    plan: Plan,
    out: Path | None,
    data_dir: Path | None,
    *,
    mesh: str | None = None,
) -> None:
    """Trains what is missing, and says what each round is worth."""
    console = make_console()
    name = f"{config.name}-{config.optimizer.rule_name}-seed{config.seed}-lottery"
    out = out or Path("runs") / name
    check_path(out)
    config = kind_of(config).resolve(config)
    check_source(config)
    if config.teacher is not None:
        check_teacher(config)
    devices = make_mesh(mesh, config.data.batch_size)
    with locked(out), progress_bar(console) as progress:
        results = _stored(out / RESULTS, config, plan)
        rounds = _Rounds(config, plan, out, data_dir, devices, progress)
        write_text(out / RESULTS, json.dumps(results, indent=2) + "\n")
        for number, trained in enumerate(rounds.tickets()):
            if number == len(results["rounds"]):
                results["rounds"].append(rounds.judged(trained))
                write_text(out / RESULTS, json.dumps(results, indent=2) + "\n")
    console.print(_table(results["rounds"], rounds.task.metric))
    console.print(f"Each round is a run in {out}", soft_wrap=True)


def _stored(path: Path, config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Stored results to continue, or new ones."""
    own = plan.stored()
    if not path.exists():
        return own | {"config": to_dict(config), "rounds": []}
    results: dict[str, Any] = read_json(path)
    with reading(path):
        earlier = from_dict(results["config"])
        before = {name: results[name] for name in own} | differences(earlier, config)
    expected = own | differences(config, earlier)
    for name, value in expected.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{path} holds another lottery, whose {name} is {before.get(name)}, "
                f"expected {value}; choose another --out"
            )
    return results


class _Rounds:
    """The trainings of a lottery; each resumes where it was stopped."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        out: Path,
        data_dir: Path | None,
        mesh: Mesh | None,
        progress: Any,
    ):
        self.config, self.plan, self.out = config, plan, out
        self.mesh, self.progress = mesh, progress
        self.notes = data_dir_note(data_dir)
        self.data, self.task = prepare(config, data_dir)
        steps = total_steps(config, self.data)
        if plan.rewind_step >= steps:
            raise ConfigError(
                f"rewind_step must be before the last of {steps} steps, got "
                f"{plan.rewind_step}"
            )
        self.sparse = dataclasses.replace(
            config,
            init_from=str(out / "early"),
            new_head=False,
            eval_targets=("dense",),
            optimizer=dataclasses.replace(config.optimizer, keep_pruned=True),
        )
        teacher = load_teacher(config, self.data, self.task)
        make_step = partial(make_train_step, data=self.data, task=self.task, mesh=mesh)
        self.dense_step = make_step(config, teacher=teacher)
        self.sparse_step = make_step(self.sparse, teacher=teacher)

    def tickets(self) -> Iterator[tuple[Any, Any]]:
        """The trained model of each round, the dense one first."""
        filters, scope = self.task.filters, self.plan.scope
        where = filters.prunable if scope == "global" else filters.uniform
        early = self._early()
        numbers = itertools.count()
        last: list[tuple[Any, Any]] = []

        def train_one(params: Any, masks: Any) -> Any:
            last[:] = [self._train(next(numbers), early, params, masks)]
            return last[0][0]

        found = lottery_tickets(
            early.params,
            train_one,
            self.plan.rounds,
            share=self.plan.share,
            scope=scope,
            where=where,
        )
        for _ in found:
            yield last[0]

    def judged(self, model: tuple[Any, Any]) -> dict[str, float]:
        """The share of zeros, and what the task measures."""
        measured = self.task.evaluate(*model, self.data.evaluation)
        return {"zeros": self.task.zeros(model[0])} | measured

    def _early(self) -> TrainState:
        """The state that rounds go back to, stored when it is first there."""
        folder, step = self.out / "early", self.plan.rewind_step
        like = jax.eval_shape(partial(init_state, self.config, self.data, self.task))
        if checkpoints.latest_step(folder) is None:
            if step:
                run = self.out / "round0"
                self._go_on(self.config, run, self.dense_step, max_steps=step)
                state = _read(run, like)
            else:
                model = initial_model(self.config, self.task)
                state = init_state(self.config, self.data, self.task, model)
            self._check_early(run if step else folder, state)
            _begin(folder, self.config, state)
        early = _read(folder, like)
        self._check_early(folder, early)
        return early

    def _check_early(self, run: Path, state: TrainState) -> None:
        if int(state.step) != self.plan.rewind_step:
            raise RunError(
                f"{run} is at step {int(state.step)}, expected rewind_step="
                f"{self.plan.rewind_step}, which rounds go back to; start again with "
                f"another --out"
            )

    def _train(
        self, number: int, early: TrainState, params: Any, masks: Any
    ) -> tuple[Any, Any]:
        run = self.out / f"round{number}"
        config, step = self.config, self.dense_step
        if number:
            name = f"{config.name}-round{number}"
            config = dataclasses.replace(self.sparse, name=name)
            step = self.sparse_step
            if checkpoints.latest_step(run) is not None:
                # The same place may have had another name.
                config = dataclasses.replace(
                    config, init_from=load_config(run).init_from
                )
        like = jax.eval_shape(partial(init_state, config, self.data, self.task))
        if number and checkpoints.latest_step(run) is None:
            _begin(run, config, rewound(early, like, params, masks))
        self._go_on(config, run, step)
        return checkpoints.load_model(run, like)

    def _go_on(
        self, config: RunConfig, run: Path, step: Any, max_steps: int | None = None
    ) -> None:
        try:
            train(
                config,
                run,
                self.data,
                self.task,
                self.progress,
                mesh=self.mesh,
                train_step=step,
                resume=checkpoints.latest_step(run) is not None,
                overwrite=True,  # only what was stopped before its first checkpoint
                max_steps=max_steps,
                # The rounds that go back to this step count from there, too.
                patience_from=self.plan.rewind_step,
                notes=self.notes,
            )
        except Stopped as stopped:
            raise Stopped(
                f"stopped in {run}; run the same command to continue", stopped.signal
            ) from stopped


def rewound(early: TrainState, like: TrainState, params: Any, masks: Any) -> TrainState:
    """An early state of the dense training, with some of the weights gone.

    Args:
      early: the state.
      like: a state with `cram_jax.keep_pruned` in its optimiser, or its shapes.
      params: those of ``early`` under the masks.
      masks: what stays.

    Returns:
      A state like ``like``. All but the masks is of ``early``: step, momentum, batch
      statistics, averages.
    """
    members = iter(early.opt_state)
    opt_state = tuple(
        KeepPrunedState(masks) if isinstance(m, KeepPrunedState) else next(members)
        for m in like.opt_state
    )
    ema = early.ema
    if jax.tree.leaves(ema):
        ema = jax.tree.map(lambda mask, leaf: jnp.where(mask, leaf, 0), masks, ema)
    return early._replace(params=params, opt_state=opt_state, ema=ema)


def _begin(run: Path, config: RunConfig, state: TrainState) -> None:
    """Makes a run whose first checkpoint is this state."""
    run.mkdir(parents=True, exist_ok=True)
    save_config(run, config)
    kind_of(config).keep_sources(config, run)
    with checkpoints.manager(run) as manager:
        checkpoints.save(manager, state)


def _read(run: Path, like: TrainState) -> TrainState:
    with checkpoints.manager(run) as manager:
        state: TrainState = checkpoints.restore(manager, like)
    return state


def _table(rounds: list[dict[str, float]], metric: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("round", "zeros", f"{metric.replace('_', ' ')} (%)"):
        table.add_column(column, justify="right")
    for number, found in enumerate(rounds):
        zeros = f"{100 * found['zeros']:.1f} %"
        table.add_row(str(number), zeros, f"{found[metric]:.1f}")
    return table
