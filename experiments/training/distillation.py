"""Knowledge distillation: a network learns from the outputs of a trained one.

Hinton, Vinyals, Dean (2015), Distilling the knowledge in a neural network, arXiv
1503.02531. The teacher sees the student's augmented batch, in evaluation mode; both
passes of CrAM get the same outputs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cram_jax.paths import named_leaves
from experiments.batches import Batch
from experiments.config import DistillationConfig, RunConfig
from experiments.errors import ConfigError
from experiments.kinds import kind_of
from experiments.runs import checkpoints
from experiments.runs.directory import load_config
from experiments.task import Model, Task

OUTPUTS = "teacher"
"""Where a batch holds the outputs of the teacher."""


class Teacher(NamedTuple):
    """A trained network whose outputs are learned.

    Attributes:
      predict: as that of its `Task`.
      model: its parameters and batch statistics, an argument of the compiled step
        rather than a constant in it.
    """

    predict: Callable[[Any, Any, Batch], Any]
    model: Model


def with_teacher(batch: Batch, teacher: Teacher) -> Batch:
    """The batch with the teacher's outputs for it."""
    return batch | {OUTPUTS: teacher.predict(*teacher.model, batch)}


def distilled(
    row_losses: jax.Array, outputs: Any, batch: Batch, config: DistillationConfig
) -> jax.Array:
    """The loss of every row, with the divergence from the teacher if there is one.

    ``(1 - weight) * row_losses + weight * divergence``.

    Args:
      row_losses: (batch,), those of the labels.
      outputs: of the network, in training.
      batch: with the outputs of the teacher, or without.
      config: the weight and the temperature.
    """
    if OUTPUTS not in batch:
        return row_losses
    apart = divergence(outputs, batch[OUTPUTS], config.temperature)
    return (1 - config.weight) * row_losses + config.weight * apart


def divergence(outputs: Any, teacher: Any, temperature: float) -> jax.Array:
    """How far outputs are from those of the teacher, for every row.

    ``T^2 KL(softmax(teacher / T) || softmax(outputs / T))``, whose gradient keeps its
    size whatever the temperature T. For a regression, with logits of one class, it is
    the squared difference.

    Args:
      outputs: logits (batch, classes), or a tree of them, whose divergences are
        averaged.
      teacher: the same of the teacher.
      temperature: T.

    Returns:
      (batch,).
    """

    def one(logits: jax.Array, wanted: jax.Array) -> jax.Array:
        if logits.shape[-1] == 1:
            return jnp.sum((logits - wanted) ** 2, axis=-1)
        apart = optax.losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(logits / temperature),
            jax.nn.log_softmax(wanted / temperature),
        )
        return temperature**2 * apart

    parts = jax.tree.leaves(jax.tree.map(one, outputs, teacher))
    return jnp.mean(jnp.stack(parts), axis=0)


def load_teacher(config: RunConfig, data: Any, task: Task) -> Teacher | None:
    """Reads the teacher that a configuration names.

    Args:
      config: of the student.
      data: of the student.
      task: of the student.

    Returns:
      The teacher; None if none is named.

    Raises:
      RunError: it is not a run, or holds no model.
      ConfigError: it is for another task.
    """
    if config.teacher is None:
        return None
    run, theirs = Path(config.teacher), check_teacher(config)
    teacher = kind_of(config).make_task(theirs, data)
    model, like = checkpoints.read_model(run), jax.eval_shape(teacher.init, 0)
    _check_alike(run, model, like)
    batch = data.train.take([0])
    ours = jax.eval_shape(task.predict, *jax.eval_shape(task.init, 0), batch)
    _check_alike(run, jax.eval_shape(teacher.predict, *model, batch), ours)
    return Teacher(teacher.predict, model)


def check_teacher(config: RunConfig) -> Any:
    """Reads the configuration of the teacher; raises if it is for another task."""
    run = Path(str(config.teacher))
    theirs = load_config(run)
    if theirs.kind != config.kind:
        raise ConfigError(f"teacher must be a run on {config.kind}, got {run}")
    kind_of(config).check_teacher(config, theirs, run)
    return theirs


def _check_alike(run: Path, theirs: Any, expected: Any) -> None:
    there, here = (
        {path: leaf.shape for path, leaf in named_leaves(tree)}
        for tree in (theirs, expected)
    )
    for path in here | there:
        if there.get(path) != here.get(path):
            raise ConfigError(
                f"teacher {run} is for another task: {path or 'its output'} is "
                f"{there.get(path)} there, expected {here.get(path)}"
            )
