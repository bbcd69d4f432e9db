"""The networks by name: initial weights, precision, what is refused."""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.errors import ConfigError
from experiments.images.config import ModelConfig, ModelName
from experiments.images.layers import Normalization
from experiments.images.models import check_images, make_model
from experiments.images.resnet import Bottleneck, ResNet
from experiments.images.task import classification
from experiments.images.vgg import VGG
from experiments.runs.stored_config import read_fields

SIZES = {
    "resnet": 19_994,
    "resnet20": 272_474,
    "resnet32": 466_906,
    "resnet44": 661_338,
    "resnet56": 855_770,
    "resnet18_cifar": 11_173_962,
    "vgg16_bn_cifar": 14_724_042,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
}


def abstract(config, classes=10):
    return nnx.eval_shape(lambda: make_model(config, 3, classes, nnx.Rngs(0)))


@pytest.mark.parametrize("name", typing.get_args(ModelName))
def test_every_name_makes_its_network(name):
    classes = 1000 if name in ("resnet18", "resnet34", "resnet50") else 10

    def forward():
        model = make_model(ModelConfig(name=name), 3, classes, nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return params, model(jnp.zeros((2, 32, 32, 3)), training=False)

    params, logits = jax.eval_shape(forward)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    assert sum(sizes) == SIZES[name]
    assert logits.shape == (2, classes)
    names = {
        entry.key for path, _ in jax.tree.leaves_with_path(params) for entry in path
    }
    assert all(isinstance(key, str) and not key.isdigit() for key in names)


@pytest.mark.parametrize(
    ("name", "layer", "uniform"),
    [
        ("resnet", ("stage2_block1", "conv1"), False),
        ("resnet20", ("stage2_block1", "conv1"), False),
        ("resnet50", ("stage2_block1", "conv2"), False),
        ("resnet18_cifar", ("stage2_block1", "conv1"), True),
        ("vgg16_bn_cifar", ("conv2_1",), True),
    ],
)
def test_networks_start_as_those_of_the_authors(name, layer, uniform):
    """Kernels normal by their fan out, or as PyTorch's defaults; uniform heads."""

    @jax.jit  # computes no more than what is returned
    def some_weights():
        model = make_model(ModelConfig(name=name), 3, 500, nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        chosen = functools.reduce(lambda node, key: node[key], layer, params)
        return chosen, params["head"]

    leaves, head = some_weights()
    kernel = leaves["kernel"]
    assert set(leaves) == {"kernel"}
    height, width, inputs, outputs = kernel.shape
    # The relative standard error of a standard deviation of n values, or less.
    error = 1 / math.sqrt(2 * kernel.size)
    if uniform:
        bound = 1 / math.sqrt(height * width * inputs)
        assert 0.99 * bound < jnp.abs(kernel).max() <= bound
        std = bound / math.sqrt(3)
    else:
        std = math.sqrt(2 / (height * width * outputs))
        assert jnp.abs(kernel).max() > 3 * std  # not truncated
    assert float(kernel.std()) == pytest.approx(std, rel=4 * error)
    assert abs(kernel.mean()) < 4 * std / math.sqrt(kernel.size)

    if name == "resnet":  # ours alone: what Flax has by default
        assert not head["bias"].any()
    else:
        bound = 1 / math.sqrt(head["kernel"].shape[0])
        for values in head.values():
            assert 0.98 * bound < jnp.abs(values).max() <= bound
            assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_batch_norm_is_that_of_pytorch():
    norm = nnx.eval_shape(lambda: Normalization(5, nnx.Rngs(0)))
    # PyTorch counts the momentum from the other end: 0.1.
    assert (norm.momentum, norm.epsilon) == (0.9, 1e-5)


def test_equal_models_have_equal_graphs():
    """Otherwise what is compiled for one would be compiled again for the other."""
    config = ModelConfig(name="resnet20")
    assert nnx.graphdef(abstract(config)) == nnx.graphdef(abstract(config))


def small_resnet(dtype):
    return ResNet(
        (4,),
        (1,),
        3,
        4,
        block=Bottleneck,
        imagenet_stem=True,
        dtype=dtype,
        rngs=nnx.Rngs(0),
    )


def small_vgg(dtype):
    return VGG(3, 4, widths=(4, 8), convolutions=(1, 1), dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("make", [small_resnet, small_vgg])
def test_bfloat16_activations_leave_parameters_and_logits_in_float32(make):
    x = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    labels = jnp.arange(8) % 4

    def loss_fn(params, graph, batch_stats):
        model = nnx.merge(graph, params, batch_stats, copy=True)
        logits = model(x, training=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits, nnx.state(model, nnx.BatchStat))

    def split(dtype):
        model = nnx.eval_shape(lambda: make(dtype))
        return nnx.split(model, nnx.Param, nnx.BatchStat)

    generator = np.random.default_rng(0)

    def draw(leaf):
        """Around 0 in kernels, around 1 in all else."""
        values = generator.normal(1, 0.2, leaf.shape) - (leaf.ndim > 1)
        return jnp.asarray(values, leaf.dtype)

    _, *trees = split(jnp.bfloat16)
    params, batch_stats = jax.tree.map(draw, trees)
    results = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        graph, *_ = split(dtype)

        @jax.jit
        def step(params, batch_stats, graph=graph):
            stored = nnx.merge(graph, params, batch_stats)(x, training=False)
            value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
            return *value_and_grad(params, graph, batch_stats), stored

        results[dtype] = step(params, batch_stats)
    for leaf in jax.tree.leaves((params, batch_stats, results[jnp.bfloat16])):
        assert leaf.dtype == jnp.float32
        assert jnp.isfinite(leaf).all()
    (expected, (logits, _)), *_ = results[jnp.float32]
    (loss, (rounded, _)), *_ = results[jnp.bfloat16]
    # bfloat16 has 8 bits: a few roundings of 2**-9, relative to values around 1.
    assert float(loss) == pytest.approx(float(expected), abs=0.03)
    assert 0 < jnp.abs(logits - rounded).max() < 0.1


def test_the_convolutions_of_a_bfloat16_network_are_of_bfloat16():
    graph, state = nnx.split(abstract(ModelConfig(dtype="bfloat16")))
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    program = jax.make_jaxpr(
        lambda state, x: nnx.merge(graph, state)(x, training=False)
    )(state, x)
    convolutions = [
        equation
        for equation in program.eqns
        if equation.primitive.name == "conv_general_dilated"
    ]
    assert len(convolutions) == 6
    assert all(eq.outvars[0].aval.dtype == jnp.bfloat16 for eq in convolutions)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(name="resnet19"), "name must be one of resnet, resnet20,"),
        (
            lambda: ModelConfig(dtype="float16"),
            "dtype must be one of float32, bfloat16",
        ),
        (
            lambda: ModelConfig(name="resnet20", widths=(4, 8)),
            r"widths must be left at \(16, 32\) for resnet20, got \(4, 8\)",
        ),
        (
            lambda: ModelConfig(name="resnet50", blocks=(2, 2)),
            r"blocks must be left at \(1, 1\) for resnet50, got \(2, 2\)",
        ),
        (lambda: ModelConfig(name="resnet50", patch=2), "patch must be 1 for resnet50"),
        (
            lambda: check_images(ModelConfig(name="vgg16_bn_cifar"), (28, 32)),
            r"vgg16_bn_cifar needs images of 32x32 or larger, got \(28, 32\)",
        ),
    ],
)
def test_what_is_wrong_with_a_model_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_stored_configurations_without_a_name_are_of_the_resnet():
    old = {"widths": [4, 8], "blocks": [1, 1], "patch": 2}
    assert read_fields(ModelConfig, old) == ModelConfig(
        name="resnet", widths=(4, 8), blocks=(1, 1), patch=2
    )


def test_a_task_has_the_network_of_its_configuration(config, data):
    model = ModelConfig(name="resnet20", dtype="bfloat16")
    task = classification(dataclasses.replace(config, model=model), data)
    params, _ = jax.eval_shape(task.init, 0)
    assert params["stem"]["conv"]["kernel"].shape == (3, 3, 1, 16)
    assert params["head"]["kernel"].shape == (64, 4)
