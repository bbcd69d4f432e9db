"""Image classification."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import cram_jax
from cram_jax.structure import Structure, trace_structure
from experiments.batches import Batch, Source
from experiments.compression.channels import CoupledChannels
from experiments.compression.targets import LeafFilters
from experiments.images.augment import augment
from experiments.images.config import ImageConfig
from experiments.images.data import Dataset
from experiments.images.models import check_images, make_model
from experiments.images.own import check_call, narrowed
from experiments.task import Task
from experiments.training.distillation import distilled

hard_losses = optax.softmax_cross_entropy_with_integer_labels

FILTERS = LeafFilters(None, cram_jax.all_but("^(stem|conv1_1|head)/"))
"""Uniform pruning leaves the first and the last layer dense, as the paper's runs do."""


def classification(config: ImageConfig, data: Dataset) -> Task:
    """The task of a configuration.

    Args:
      config: the model, the augmentation, the label smoothing.
      data: for the shape of its images, its classes and its statistics.

    Returns:
      The task.

    Raises:
      ConfigError: the model does not suit the size of the images; or one of the
        user's own cannot be called as ours are.
    """
    check_images(config.model, data.shape[:2])
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_network(config, data, 0)))
    if config.model.module:
        check_call(
            config.model.module,
            lambda: make_network(config, data, 0),
            data.shape,
            data.classes,
        )

    @jax.jit
    def init(seed: int) -> tuple[Any, Any]:
        _, *states = nnx.split(
            make_network(config, data, seed), nnx.Param, nnx.BatchStat
        )
        params, batch_stats = map(nnx.to_pure_dict, states)
        return params, batch_stats

    def forward(
        params: Any, batch_stats: Any, images: jax.Array, training: bool
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, batch_stats, copy=True)
        logits = model(data.normalize(images), training=training)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def loss_fn(
        params: Any, batch_stats: Any, batch: Batch, dropout_key: Any = None
    ) -> tuple[jax.Array, Any]:
        del dropout_key
        logits, batch_stats = forward(params, batch_stats, batch["image"], True)
        labels = jax.nn.one_hot(batch["label"], data.classes)
        labels = optax.smooth_labels(labels, config.label_smoothing)
        losses = optax.softmax_cross_entropy(logits, labels)
        losses = distilled(losses, logits, batch, config.distillation)
        return losses.mean(), batch_stats

    def predict(params: Any, batch_stats: Any, batch: Batch) -> jax.Array:
        return forward(params, batch_stats, batch["image"], False)[0]

    def trace() -> Structure:
        images = jax.ShapeDtypeStruct((1, *data.shape), jnp.float32)
        return trace_structure(
            lambda both, images: predict(both[0], both[1], {"image": images}),
            jax.eval_shape(init, 0),
            images,
        )

    def evaluation_loss(params: Any, batch_stats: Any, batch: Batch) -> jax.Array:
        logits = predict(params, batch_stats, batch)
        return hard_losses(logits, batch["label"]).mean()

    @jax.jit
    def totals(params: Any, batch_stats: Any, batch: Batch) -> dict[str, jax.Array]:
        logits = predict(params, batch_stats, batch)
        losses = hard_losses(logits, batch["label"])
        correct = logits.argmax(axis=-1) == batch["label"]
        return {
            "accuracy": jnp.sum(100 * correct * batch["weight"]),
            "loss": jnp.sum(losses * batch["weight"]),
        }

    def evaluate(params: Any, batch_stats: Any, images: Source) -> dict[str, float]:
        batches = images.evaluation_batches(config.data.evaluation_batch)
        sums = [totals(params, batch_stats, batch) for batch in batches]
        return {
            name: float(sum(s[name] for s in sums)) / images.size for name in sums[0]
        }

    def augment_batch(key: jax.Array, batch: Batch) -> Batch:
        images = augment(
            key, batch["image"], shift=config.data.shift, flip=config.data.flip
        )
        return batch | {"image": images}

    return Task(
        init,
        augment_batch,
        loss_fn,
        evaluate,
        predict,
        evaluation_loss,
        filters=FILTERS._replace(channels=CoupledChannels(trace)),
    )


def make_network(config: ImageConfig, data: Dataset, seed: int) -> nnx.Module:
    """The network of a run, for the images and classes of its data."""
    model = make_model(
        config.model,
        channels=data.shape[-1],
        classes=data.classes,
        rngs=nnx.Rngs(jax.random.key(seed)),
    )
    if config.model.module and config.model.layer_widths:
        return narrowed(model, data.shape, config.model.layer_widths)
    return model
