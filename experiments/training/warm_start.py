"""Where a run starts from: another run's model, or published weights."""

from pathlib import Path

import jax
import jax.numpy as jnp

from cram_jax.paths import named_leaves
from experiments.config import RunConfig
from experiments.errors import ConfigError, WeightsError
from experiments.kinds import kind_of
from experiments.runs import checkpoints
from experiments.task import Model, Task


def check_source(config: RunConfig) -> None:
    """Raises unless a configuration names something that a run can start from.

    Raises:
      ConfigError: it is not named, or is neither a directory nor a file of weights.
      WeightsError: the weights of a text run do not fit its network.
    """
    kind, source = kind_of(config), config.init_from
    if config.new_head and source is None and not getattr(config, "weights", None):
        raise ConfigError("new_head needs a model to start from, see --init-from")
    if source is None:
        kind.check_weights(config)
        return
    if not source:
        raise ConfigError(
            f"{config.name} starts from trained weights: name {kind.SOURCES} with "
            f"--init-from"
        )
    if not Path(source).is_dir() and Path(source).suffix not in kind.WEIGHT_FILES:
        endings = f" ending in {', '.join(kind.WEIGHT_FILES)}" * bool(kind.WEIGHT_FILES)
        raise ConfigError(f"init_from must be {kind.SOURCES}{endings}, got {source!r}")


def initial_model(config: RunConfig, task: Task) -> Model | None:
    """Reads the parameters and batch statistics that a run starts from.

    Args:
      config: ``init_from``, or ``weights`` of a text run, says where to start from;
        ``new_head`` whether the last layer is drawn at random instead.
      task: for the shapes.

    Returns:
      params and batch_stats like those of ``task.init``; None to use ``task.init``.

    Raises:
      ConfigError: see `check_source`.
      RunError: the directory holds no model.
      WeightsError: the model does not fit.
    """
    check_source(config)
    if config.new_head:
        _check_head(config, task)
    if config.init_from is None:
        pretrained = task.pretrained(config.seed)
        if pretrained is None or not config.new_head:
            return pretrained
        params, batch_stats = pretrained
        drawn = task.init(config.seed)[0]
        return params | {name: drawn[name] for name in task.head}, batch_stats
    source = Path(config.init_from)
    ours = task.init(config.seed)
    if source.is_dir():
        params, batch_stats = checkpoints.read_model(source)
    else:
        classes = ours[0]["head"]["bias"].shape[0] if config.new_head else None
        params, batch_stats = kind_of(config).load_weights(config, source, classes)
    if config.new_head:
        params = params | {name: ours[0][name] for name in task.head}
    _check_shapes((params, batch_stats), ours, config, task.head)
    return jax.tree.map(jnp.asarray, (params, batch_stats))


def _check_head(config: RunConfig, task: Task) -> None:
    params, _ = jax.eval_shape(task.init, 0)
    if missing := [name for name in task.head if name not in params]:
        raise ConfigError(
            f"new_head needs a last layer called {missing[0]!r}; {config.model.title} "
            f"has {', '.join(params)}"
        )


def _check_shapes(
    theirs: Model, ours: Model, config: RunConfig, head: tuple[str, ...]
) -> None:
    there, here = _shapes(theirs), _shapes(ours)
    wrong = [path for path in here if here[path] != there.get(path)]
    wrong += [path for path in there if path not in here]
    if not wrong:
        return
    path = wrong[0]
    advice = ""
    if all(other.split("/")[0] in head for other in wrong):
        advice = "; --new-head draws a new classification layer"
    raise WeightsError(
        f"{config.init_from} does not fit {config.model.name} here: {path} is "
        f"{there.get(path, 'missing')} there and {here.get(path, 'missing')} here, and "
        f"{len(wrong) - 1} more differ{advice}"
    )


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for tree in model for path, leaf in named_leaves(tree)}
