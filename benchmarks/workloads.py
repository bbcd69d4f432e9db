"""What the benchmarks train: real networks at real sizes, on made-up data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.images.config import ModelConfig
from experiments.images.models import make_model
from experiments.text.bert import BertForQuestionAnswering
from experiments.text.config import BASE, SMALL, BertConfig


class Workload(NamedTuple):
    """A loss and its arguments.

    Attributes:
      loss_fn: ``(params, **inputs) -> (loss, aux)``.
      params: the parameters.
      inputs: the other arguments, by name.
      batched: the names of those whose first axis is the batch.
      where: the prunable leaves, as projectors take it.
    """

    loss_fn: Callable[..., tuple[jax.Array, Any]]
    params: Any
    inputs: dict[str, Any]
    batched: tuple[str, ...]
    where: Any = None


def resnet(name: str, side: int, batch: int) -> Workload:
    """A network of `experiments.images.models` on square images, with batch norm."""
    classes = 10 if side == 32 else 1000
    model = make_model(ModelConfig(name=name), 3, classes, nnx.Rngs(0))
    graph, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_fn(params, batch_stats, images, labels):
        model = nnx.merge(graph, params, batch_stats, copy=True)
        logits = model(images, training=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    inputs = {
        "batch_stats": nnx.to_pure_dict(batch_stats),
        "images": jax.random.normal(jax.random.key(0), (batch, side, side, 3)),
        "labels": jnp.arange(batch) % classes,
    }
    return Workload(loss_fn, nnx.to_pure_dict(params), inputs, ("images", "labels"))


def bert(config: BertConfig, length: int, batch: int) -> Workload:
    """Question answering; the encoder's kernels are prunable, dropout is off."""
    model = BertForQuestionAnswering(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def loss_fn(params, tokens, starts, ends):
        logits = nnx.merge(graph, params, copy=True)(tokens, training=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            jnp.stack(logits, 1), jnp.stack([starts, ends], 1)
        )
        return losses.mean(), None

    shape = (batch, length)
    inputs = {
        "tokens": jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size),
        "starts": jnp.arange(batch) % length,
        "ends": jnp.arange(batch) * 2 % length,
    }
    return Workload(
        loss_fn,
        nnx.to_pure_dict(params),
        inputs,
        batched=(*inputs,),
        where=lambda path, leaf: "/layer" in path and leaf.ndim == 2,
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "ResNet-20, 32x32, batch 128": lambda: resnet("resnet20", 32, 128),
    "ResNet-50, 224x224, batch 4": lambda: resnet("resnet50", 224, 4),
    "BERT 6x384, length 128, batch 16": lambda: bert(SMALL, 128, 16),
    "BERT 12x768, length 128, batch 8": lambda: bert(BASE, 128, 8),
}
