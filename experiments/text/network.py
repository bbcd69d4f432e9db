"""What tasks on text share: a BERT as pure functions of plain trees."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

import cram_jax
from cram_jax.structure import Structure, trace_structure
from experiments.batches import Batch, Source
from experiments.compression.channels import CoupledChannels
from experiments.compression.targets import LeafFilters
from experiments.errors import WeightsError
from experiments.text.config import BertConfig, TextConfig
from experiments.text.huggingface import HEADS, Model, load_bert, read_config
from experiments.training.distillation import distilled

# Fields that may differ from the weights', as they change no tensor and no output.
IGNORED_FIELDS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
)


_LAYERS = cram_jax.matching(r"^bert/layer\d+/.*/kernel$")
ENCODER = LeafFilters(_LAYERS, _LAYERS)
"""The dense layers of a BERT; its embeddings, pooler and task head stay dense."""

HEADS_AND_UNITS = (r"/attention/query/kernel\[1\.0\]$", r"/intermediate/kernel\[1\]$")
"""Which families lose channels. The number of features of a head, by which attention
divides, does not change."""


class Network(NamedTuple):
    """A BERT with a task head.

    Attributes:
      init: ``seed -> (params, {})``.
      pretrained: ``seed -> (params, {})`` of the configuration's weights, or None.
      forward: ``(params, batch, training, dropout_key=None)``, the model's output.
      predict: ``(params, {}, batch)``, the same in evaluation mode, see `Task`.
      module: ``params -> Model``, the model itself.
      filters: what targets compress.
    """

    init: Callable[[int], tuple[Any, Any]]
    pretrained: Callable[[int], tuple[Any, Any] | None]
    forward: Callable[..., Any]
    predict: Callable[..., Any]
    module: Callable[[Any], Model]
    filters: LeafFilters


def network(
    config: TextConfig, head: str, options: dict[str, Any] | None = None
) -> Network:
    """The network of a configuration.

    Args:
      config: its shape and its weights.
      head: "question_answering" or "classification".
      options: of the head: how many ``labels``.

    Returns:
      Its functions.
    """
    options = options or {}
    dtype = jnp.dtype(config.model.dtype)

    def make(seed: Any) -> Model:
        rngs = nnx.Rngs(jax.random.key(seed))
        return HEADS[head](config.model.shape, **options, dtype=dtype, rngs=rngs)

    graph = nnx.graphdef(nnx.eval_shape(lambda: make(0)))

    @jax.jit
    def init(seed: int) -> tuple[Any, Any]:
        return _params(make(seed)), {}

    def pretrained(seed: int) -> tuple[Any, Any] | None:
        check_weights(config)
        if config.weights is None:
            return None
        loaded = load_bert(
            config.weights, head, seed=seed, new_head=config.new_head, **options
        )
        return _params(loaded.model), {}

    def module(params: Any) -> Model:
        return nnx.merge(graph, params, copy=True)

    def forward(
        params: Any, batch: Batch, training: bool, dropout_key: Any = None
    ) -> Any:
        return module(params)(
            batch["input_ids"],
            batch["attention_mask"],
            batch["token_type_ids"],
            training=training,
            dropout_key=dropout_key,
        )

    def predict(params: Any, batch_stats: Any, batch: Batch) -> Any:
        del batch_stats
        return forward(params, batch, False)

    def trace() -> Structure:
        ids = jax.ShapeDtypeStruct((1, config.data.max_length), jnp.int32)
        names = ("input_ids", "attention_mask", "token_type_ids")
        return trace_structure(
            lambda variables, batch: forward(variables[0], batch, False),
            jax.eval_shape(init, 0),
            dict.fromkeys(names, ids),
        )

    filters = ENCODER._replace(channels=CoupledChannels(trace, HEADS_AND_UNITS))
    return Network(init, pretrained, forward, predict, module, filters)


def losses(
    config: TextConfig, model: Network, row_losses: Callable[..., jax.Array]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two losses of a task, see `Task`.

    Args:
      config: for the label smoothing and the distillation, in training.
      model: the network.
      row_losses: ``(what the model gives, batch, smoothing) -> loss of every row``.

    Returns:
      Its ``loss_fn`` and its ``evaluation_loss``.
    """

    def loss_fn(
        params: Any, batch_stats: Any, batch: Batch, dropout_key: Any = None
    ) -> tuple[jax.Array, Any]:
        outputs = model.forward(params, batch, True, dropout_key)
        rows = row_losses(outputs, batch, config.label_smoothing)
        rows = distilled(rows, outputs, batch, config.distillation)
        return rows.mean(), batch_stats

    def evaluation_loss(params: Any, batch_stats: Any, batch: Batch) -> jax.Array:
        del batch_stats
        return row_losses(model.forward(params, batch, False), batch, 0.0).mean()

    return loss_fn, evaluation_loss


def predict_all(
    predict: Callable[..., Any], params: Any, examples: Source, batch_size: int
) -> list[np.ndarray]:
    """The results of ``predict(params, batch)`` for every example, as arrays."""
    # If parameters are spread over several processes, so are the results.
    gather = partial(multihost_utils.process_allgather, tiled=True)
    batches = examples.evaluation_batches(batch_size)
    parts = [gather(predict(params, batch)) for batch in batches]
    return [np.concatenate(a)[: examples.size] for a in zip(*parts, strict=True)]


def check_weights(config: TextConfig) -> None:
    """Raises if a run cannot start from the weights.

    Raises:
      ConfigError: no weights are named.
      WeightsError: they are missing, or their shape is not that of the configuration;
        the message says which options to set.
    """
    if config.weights is None:
        return
    config.check_inputs()
    theirs, ours = read_config(config.weights), config.model
    names = [field.name for field in dataclasses.fields(BertConfig)]
    wrong = {
        name: getattr(theirs, name)
        for name in names
        if name not in IGNORED_FIELDS and getattr(theirs, name) != getattr(ours, name)
    }
    if wrong:
        name, value = next(iter(wrong.items()))
        flags = [f"--model.{n.replace('_', '-')} {v}" for n, v in wrong.items()]
        raise WeightsError(
            f"{config.weights} has {name}={value}, but {config.name} is configured for "
            f"{name}={getattr(ours, name)}; for these weights add {' '.join(flags)}"
        )


def _params(model: Model) -> Any:
    return nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
