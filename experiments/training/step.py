"""The state of a run, and the compiled step that changes it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.batches import Batch, whole_batches
from experiments.config import RunConfig
from experiments.errors import ConfigError
from experiments.images.data import Dataset
from experiments.sharding import state_shardings
from experiments.task import Task
from experiments.training.distillation import Teacher, with_teacher
from experiments.training.optimizers import learning_rate, make_optimizer


class TrainState(NamedTuple):
    """Everything that changes during a run.

    Attributes:
      step: int32 scalar, the number of steps taken.
      params: the parameters.
      batch_stats: running statistics of batch normalisation.
      opt_state: state of the optimiser.
      key: PRNG key of the run, for augmentation and dropout; it stays the same.
      ema: the running average of the parameters; empty if the run keeps none.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    key: jax.Array
    ema: Any = ()

    @property
    def judged(self) -> Any:
        """The parameters that are evaluated and compressed."""
        return self.ema if jax.tree.leaves(self.ema) else self.params


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def total_steps(config: RunConfig, data: Dataset) -> int:
    """Steps of a whole run."""
    return config.epochs * steps_per_epoch(config, data)


def steps_per_epoch(config: RunConfig, data: Dataset) -> int:
    """Whole batches among the training examples; raises if there is none."""
    return whole_batches(data.train.size, config.data.batch_size)


def init_state(
    config: RunConfig, data: Dataset, task: Task, model: tuple[Any, Any] | None = None
) -> TrainState:
    """The state before the first step, a function of the configuration's seed.

    Args:
      config: the run.
      data: for the length of the schedule.
      task: what to learn.
      model: parameters and batch statistics; by default drawn from the seed.

    Returns:
      The state.
    """
    steps = total_steps(config, data)
    optimizer = make_optimizer(
        config.optimizer, task.loss_fn, steps, config.seed, task.filters
    )
    params, batch_stats = model or task.init(config.seed)
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        key=jax.random.key(config.seed),
        # A copy, because the step donates the memory of both.
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema else (),
    )


def make_train_step(
    config: RunConfig,
    data: Dataset,
    task: Task,
    mesh: Mesh | None = None,
    teacher: Teacher | None = None,
) -> TrainStep:
    """Compiles the training step, which serves every seed and donates the state.

    Args:
      config: for the optimiser.
      data: for the length of the schedule.
      task: for the loss.
      mesh: keeps the state sharded as `state_shardings` says.
      teacher: whose outputs the loss needs, if it does.

    Returns:
      ``(state, batch) -> (state, metrics)``.
    """
    steps = total_steps(config, data)
    rule = config.optimizer
    loss_fn = task.loss_fn
    if rule.accumulate > 1:
        loss_fn = accumulated(loss_fn, rule.accumulate)
    optimizers = {
        plain: make_optimizer(rule, loss_fn, steps, filters=task.filters, plain=plain)
        for plain in (False, True)
    }
    schedule = learning_rate(rule, steps)
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(
        state: TrainState, batch: Batch, teacher_model: Any = None, plain: bool = False
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        batch = task.augment(key, batch)
        if teacher is not None:
            batch = with_teacher(batch, teacher._replace(model=teacher_model))
        batch, rest = two_parts(batch, rule.batch_share)
        inputs = {
            "batch_stats": state.batch_stats,
            "batch": batch,
            "dropout_key": jax.random.fold_in(key, 0),
        }
        (loss, batch_stats), grads = gradient_fn(state.params, **inputs)
        updates, opt_state = optimizers[plain].update(
            grads, state.opt_state, state.params, **(inputs | {"batch": rest})
        )
        params = optax.apply_updates(state.params, updates)

        metrics = {"loss": loss, "learning_rate": schedule(state.step)}
        compressed = optax.tree.get(opt_state, "compressed_loss")
        if compressed is not None:
            metrics["compressed_loss"] = compressed
        ema = state.ema
        if rule.ema:
            ema = optax.incremental_update(params, ema, 1 - rule.ema)
        state = TrainState(
            state.step + 1, params, batch_stats, opt_state, state.key, ema
        )
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(
                state, state_shardings(mesh, state)
            )
        return state, metrics

    step: Any = jax.jit(train_step, donate_argnames="state", static_argnames="plain")
    if teacher is not None:
        place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        step = partial(step, teacher_model=jax.device_put(teacher.model, place))
    return _with_plain_steps(step, rule.plain_steps) if rule.plain_steps else step


def _with_plain_steps(step: Callable[..., Any], share: float) -> TrainStep:
    """Leaves out the rule at a random share of the steps.

    They are another program, chosen here: convolutions are slow inside ``lax.cond`` on
    a CPU.
    """

    def train_step(state: TrainState, batch: Batch) -> Any:
        # A different draw from those of augmentation and dropout.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        return step(state, batch, plain=bool(jax.random.bernoulli(key, share)))

    return train_step


def two_parts(batch: Batch, share: float) -> tuple[Batch, Batch]:
    """The examples of a step for its dense and for its compressed gradient.

    Args:
      batch: arrays with one row for each example.
      share: of the examples, for each of the two.

    Returns:
      The first and the last of every few rows, so that a batch that is sharded stays
      where it is; both are the whole batch if ``share`` is 1.
    """
    size = len(jax.tree.leaves(batch)[0])
    kept = max(1, round(share * size))
    groups = math.gcd(size, kept)
    each = kept // groups

    def cut(part: slice) -> Batch:
        def rows(array: jax.Array) -> jax.Array:
            split = array.reshape(groups, size // groups, *array.shape[1:])
            return split[:, part].reshape(kept, *array.shape[1:])

        return jax.tree.map(rows, batch)

    return cut(slice(each)), cut(slice(-each, None))


def accumulated(loss_fn: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """The same loss, computed from one part of the batch at a time to save memory.

    Accumulating inside the loss serves both passes of CrAM: gradients are those of the
    whole batch, and only one part's activations are kept.

    Args:
      loss_fn: ``(params, batch_stats, batch, dropout_key) -> (loss, batch_stats)``.
      parts: how many; they divide the batch.

    Returns:
      A function of the same arguments. Batch norm sees one part at a time, and so does
      dropout.
    """

    def loss(
        params: Any, batch_stats: Any, batch: Batch, dropout_key: Any = None
    ) -> tuple[jax.Array, Any]:
        size = len(jax.tree.leaves(batch)[0])
        if size % parts:
            raise ConfigError(
                f"accumulate must divide the {size} examples of a step, got {parts}"
            )

        def cut(rows: jax.Array) -> jax.Array:
            # Every n-th row: a batch that is sharded stays where it is.
            split = rows.reshape(size // parts, parts, *rows.shape[1:])
            return jnp.swapaxes(split, 0, 1)

        @jax.checkpoint
        def one(params: Any, batch_stats: Any, part: Batch, key: Any) -> Any:
            return loss_fn(params, batch_stats, part, key)

        def body(batch_stats: Any, inputs: Any) -> tuple[Any, jax.Array]:
            part_loss, batch_stats = one(params, batch_stats, *inputs)
            return batch_stats, part_loss

        keys = None if dropout_key is None else jax.random.split(dropout_key, parts)
        batch_stats, losses = jax.lax.scan(
            body, batch_stats, (jax.tree.map(cut, batch), keys)
        )
        return losses.mean(), batch_stats

    return loss
