"""Every emitter gives the model's own numbers."""

import jax
import numpy as np
import pytest
from flax import nnx

from cram_jax import engine
from experiments.deployment.graphs import bert_graph, image_graph
from experiments.images.config import ModelConfig
from experiments.images.models import make_model
from experiments.images.resnet import Bottleneck, ResNet
from experiments.images.vgg import VGG
from experiments.text.bert import (
    Bert,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)
from experiments.text.config import BertConfig

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.usefixtures("quick_compilation")

MODELS = {
    "patches": (
        lambda rngs: make_model(
            # With other widths in every layer, as after shrink.
            ModelConfig(
                patch=2, widths=(8, 12), blocks=(1, 1), layer_widths=(7, 5, 7, 9, 11)
            ),
            3,
            10,
            rngs,
        ),
        8,
    ),
    "bottlenecks": (
        lambda rngs: ResNet(
            (4, 8), (1, 2), 3, 7, block=Bottleneck, imagenet_stem=True, rngs=rngs
        ),
        29,
    ),
    "vgg": (
        lambda rngs: VGG(3, 5, widths=(6, 8), convolutions=(1, 2), rngs=rngs),
        9,
    ),
}


def run(model, *inputs):
    """The model's results, by one program."""
    definition, state = nnx.split(model)
    return jax.jit(lambda s, *x: nnx.merge(definition, s)(*x, training=False))(
        state, *inputs
    )


def randomise_statistics(model, rng):
    """Batch norm as after training, so that nothing is multiplied by one."""
    for _, norm in nnx.iter_graph(model):
        if isinstance(norm, nnx.BatchNorm):
            shape = norm.mean[...].shape
            norm.mean[...] = rng.standard_normal(shape).astype(np.float32) / 5
            norm.var[...] = rng.random(shape).astype(np.float32) + 0.5
            norm.scale[...] = rng.random(shape).astype(np.float32) + 0.5
            norm.bias[...] = rng.standard_normal(shape).astype(np.float32) / 5


@pytest.mark.parametrize("name", MODELS)
def test_images(name):
    make, side = MODELS[name]
    rng = np.random.default_rng(0)
    model = make(nnx.Rngs(0))
    randomise_statistics(model, rng)
    images = rng.standard_normal((2, side, side, 3)).astype(np.float32)
    expected = np.asarray(run(model, images))
    got = engine.compile(image_graph(model, (side, side)))(images)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kind", [Bert, BertForQuestionAnswering, BertForSequenceClassification]
)
def test_texts(kind):
    config = BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=20,
        initializer_range=0.2,
        # Of a model that was made smaller.
        layer_heads=(2,) if kind is Bert else (),
        layer_units=(25,) if kind is Bert else (),
    )
    rng = np.random.default_rng(0)
    model = kind(config, rngs=nnx.Rngs(0))
    ids = rng.integers(0, 60, (3, 11))
    mask = (np.arange(11) < np.array([[11], [4], [0]])).astype(int)
    inputs = ids, mask, rng.integers(0, 2, (3, 11))
    expected = run(model, *inputs)
    if kind is Bert:
        expected = expected.hidden
    elif kind is BertForQuestionAnswering:
        expected = np.stack(expected, axis=-1)
    got = engine.compile(bert_graph(model))(*inputs)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
