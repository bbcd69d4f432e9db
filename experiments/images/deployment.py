"""Image classifiers in the form that engines take."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.batches import Batch
from experiments.deployment.graphs import image_graph
from experiments.deployment.network import (
    Inputs,
    Network,
    Samples,
    Scored,
    make_samples,
)
from experiments.images.config import ImageConfig, ModelConfig
from experiments.images.data import Dataset
from experiments.images.models import make_model
from experiments.images.resnet import ResNet
from experiments.images.vgg import VGG


def deploy(
    config: ImageConfig, data: Dataset, params: Any, batch_stats: Any
) -> Network:
    """The network of a run with these parameters; its inputs are normalised images."""
    return image_network(config.model, data.shape, data.classes, params, batch_stats)


def image_network(
    config: ModelConfig,
    shape: tuple[int, int, int],
    classes: int,
    params: Any,
    batch_stats: Any,
) -> Network:
    """A classifier of images of a shape."""
    exact = dataclasses.replace(config, dtype="float32")

    def make() -> nnx.Module:
        return make_model(exact, shape[2], classes, nnx.Rngs(0))

    definition = nnx.graphdef(nnx.eval_shape(make))
    model: Any = nnx.merge(definition, params, batch_stats, copy=True)
    ours = isinstance(model, ResNet | VGG)

    @jax.jit
    def forward(state: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(definition, *state, copy=True)(images, training=False)

    state = jax.device_put((params, batch_stats))
    nbytes = sum(4 * leaf.size for leaf in jax.tree.leaves(state))
    return Network(
        partial(forward, state),
        nbytes,
        ("images",),
        "logits",
        partial(image_graph, model, shape[:2]) if ours else None,
        config.title,
    )


def samples(config: ImageConfig, data: Dataset) -> Samples:
    """The images of a run."""

    def as_inputs(batch: Batch) -> Inputs:
        return (np.ascontiguousarray(data.normalize(batch["image"]), np.float32),)

    def accuracy(scored: Scored) -> float:
        correct = [logits.argmax(axis=-1) == batch["label"] for logits, batch in scored]
        return 100 * float(np.mean(np.concatenate(correct)))

    size = config.data.evaluation_batch
    return make_samples(
        data.train, data.evaluation, as_inputs, accuracy, "accuracy", size
    )
