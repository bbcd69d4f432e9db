"""Our networks as graphs of `cram_jax.engine`."""

from typing import Any

import numpy as np
from flax import nnx

from cram_jax import engine
from experiments.images.resnet import BasicBlock, Bottleneck, ResNet
from experiments.images.vgg import VGG
from experiments.text.bert import (
    Bert,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    Layer,
)


def image_graph(model: ResNet | VGG, size: tuple[int, int]) -> engine.Graph:
    """The graph of an image classifier, from images to logits.

    Args:
      model: with its weights, pruned or not, and its batch-norm statistics.
      size: height and width of the images.
    """
    network = engine.GraphBuilder()
    if isinstance(model, VGG):
        return _vgg_graph(network, model, size)
    conv: Any = model.stem["conv"]
    norm: Any = model.stem["norm"]
    channels = conv.in_features // model.patch**2
    x = network.add(engine.Input((*size, channels)), name="images")
    if model.patch > 1:
        x = network.add(engine.SpaceToDepth(model.patch), x)
    x = _normalised(network, conv, norm, x, relu=True)
    if model.pools:
        x = network.add(engine.MaxPool(3, 2, 1), x)
    for name in model.order:
        x = _block(network, getattr(model, name), x)
    x = network.add(engine.Mean(), x)
    return network.build(_linear(network, model.head, x, name="logits"))


def bert_graph(
    model: BertForQuestionAnswering | BertForSequenceClassification | Bert,
) -> engine.Graph:
    """The graph of a BERT; its inputs are ids, mask and token types, all integers.

    Returns:
      For an encoder the features; for a classifier the logits; for question answering
      (batch, length, 2), the logits of start and end.
    """
    bert = model if isinstance(model, Bert) else model.bert
    network = engine.GraphBuilder()
    ids, mask, types = (
        network.add(engine.Input((None,), "int32"), name=name)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    words, positions, segments = (
        _array(table.embedding)
        for table in (
            bert.embeddings.word,
            bert.embeddings.position,
            bert.embeddings.token_type,
        )
    )
    x = network.add(engine.Embedding(words), ids)
    x = network.add(engine.AddPositions(positions), x)
    x = network.add(engine.Add(), x, network.add(engine.Embedding(segments), types))
    x = _layer_norm(network, bert.embeddings.norm, x)
    for name in bert.order:
        x = _layer(network, getattr(bert, name), x, mask)
    if isinstance(model, BertForQuestionAnswering):
        x = _linear(network, model.qa_outputs, x, name="logits")
    elif isinstance(model, BertForSequenceClassification):
        x = _linear(network, bert.pooler, network.add(engine.Token(0), x))
        x = network.add(engine.Tanh(), x)
        x = _linear(network, model.classifier, x, name="logits")
    return network.build(x)


def _layer(network: engine.GraphBuilder, layer: Layer, x: str, mask: str) -> str:
    part = layer.attention
    inputs = [_linear(network, f, x) for f in (part.query, part.key, part.value)]
    y = network.add(engine.Attention(part.heads), *inputs, mask)
    y = network.add(engine.Add(), _linear(network, part.output, y), x)
    x = _layer_norm(network, layer.attention_norm, y)
    y = network.add(engine.Gelu(), _linear(network, layer.intermediate, x))
    y = network.add(engine.Add(), _linear(network, layer.output, y), x)
    return _layer_norm(network, layer.output_norm, y)


def _block(network: engine.GraphBuilder, block: BasicBlock | Bottleneck, x: str) -> str:
    y = _normalised(network, block.conv1, block.norm1, x, relu=True)
    y = _normalised(
        network, block.conv2, block.norm2, y, relu=isinstance(block, Bottleneck)
    )
    if isinstance(block, Bottleneck):
        y = _normalised(network, block.conv3, block.norm3, y, relu=False)
    if block.projects:
        x = _normalised(network, block.shortcut, block.shortcut_norm, x, relu=False)
    return network.add(engine.Relu(), network.add(engine.Add(), y, x))


def _vgg_graph(
    network: engine.GraphBuilder, model: VGG, size: tuple[int, int]
) -> engine.Graph:
    conv: Any = getattr(model, "conv1_1")  # noqa: B009  # its layers are set by name
    channels = conv.in_features
    x = network.add(engine.Input((*size, channels)), name="images")
    for stage, count in enumerate(model.convolutions, 1):
        for index in range(1, count + 1):
            conv = getattr(model, f"conv{stage}_{index}")
            norm = getattr(model, f"norm{stage}_{index}")
            x = _normalised(network, conv, norm, x, relu=True)
        x = network.add(engine.MaxPool(2, 2), x)
    x = network.add(engine.Mean(), x)
    return network.build(_linear(network, model.head, x, name="logits"))


def _normalised(
    network: engine.GraphBuilder,
    conv: nnx.Conv,
    norm: nnx.BatchNorm,
    x: str,
    *,
    relu: bool,
) -> str:
    kernel, bias = _array(conv.kernel), conv.bias
    strides: Any = conv.strides
    padding: Any = conv.padding
    layer = engine.Conv(
        kernel,
        None if bias is None else _array(bias),
        strides,
        padding,
    )
    x = network.add(layer, x)
    x = network.add(
        engine.batch_norm(
            _array(norm.mean),
            _array(norm.var),
            _array(norm.scale),
            _array(norm.bias),
            epsilon=norm.epsilon,
        ),
        x,
    )
    return network.add(engine.Relu(), x) if relu else x


def _linear(
    network: engine.GraphBuilder, layer: nnx.Linear, x: str, name: str | None = None
) -> str:
    operation = engine.Linear(_array(layer.kernel), _array(layer.bias))
    return network.add(operation, x, name=name)


def _layer_norm(network: engine.GraphBuilder, norm: nnx.LayerNorm, x: str) -> str:
    operation = engine.LayerNorm(_array(norm.scale), _array(norm.bias), norm.epsilon)
    return network.add(operation, x)


def _array(parameter: Any) -> np.ndarray:
    return np.asarray(parameter[...], np.float32)
