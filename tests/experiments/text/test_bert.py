"""BERT: sizes, padding, dropout, precision, and its place in plain trees."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.errors import ConfigError
from experiments.text.bert import (
    Bert,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)
from experiments.text.config import BASE, SMALL, TINY, BertConfig

MINUTE = BertConfig(
    vocab_size=37,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=9,
)
STILL = dataclasses.replace(
    MINUTE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
LARGE = BertConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 37, (3, 7)))
MASK = jnp.asarray([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]])
HEADS = [Bert, BertForQuestionAnswering, BertForSequenceClassification]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def split(model):
    graph, params = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(params)


def shapes(make):
    """Paths and shapes of the parameters, computed abstractly."""
    leaves = jax.tree.leaves_with_path(split(nnx.eval_shape(make))[1])
    keystr = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): leaf.shape for path, leaf in leaves}


@pytest.fixture(scope="module", params=HEADS, ids=lambda head: head.__name__)
def model(request):
    return request.param(MINUTE, rngs=nnx.Rngs(0))


def run(model, *inputs, training=False, seed=None):
    """Calls the model, compiled once for all that have the same graph."""
    graph, params = split(model)
    key = None if seed is None else jax.random.key(seed)
    return forward(graph, training, params, inputs, key)


@partial(jax.jit, static_argnums=(0, 1))
def forward(graph, training, params, inputs, key):
    model = nnx.merge(graph, params, copy=True)
    return model(*inputs, training=training, dropout_key=key)


def first(outputs):
    return jax.tree.leaves(outputs)[0]


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # As published for bert-base-uncased, bert-large-uncased, MiniLM-L6-H384, and
        # bert_uncased_L-2_H-128_A-2.
        (BASE, 109_482_240),
        (LARGE, 335_141_888),
        (SMALL, 22_713_216),
        (TINY, 4_385_920),
    ],
)
def test_the_sizes_have_the_published_numbers_of_parameters(config, count):
    made = shapes(lambda: Bert(config, rngs=nnx.Rngs(0)))
    assert sum(map(np.prod, made.values())) == count


def test_every_dense_layer_is_one_matrix_from_inputs_to_outputs():
    made = shapes(lambda: BertForSequenceClassification(MINUTE, 5, rngs=nnx.Rngs(0)))
    kernels = {
        path.removeprefix("bert/layer1/").removesuffix("/kernel"): shape
        for path, shape in made.items()
        if path.endswith("kernel") and "layer0" not in path
    }
    attention = ("query", "key", "value", "output")
    assert kernels == {f"attention/{name}": (12, 12) for name in attention} | {
        "intermediate": (12, 20),
        "output": (20, 12),
        "bert/pooler": (12, 12),
        "classifier": (12, 5),
    }


def test_no_key_of_the_tree_is_a_number(model):
    leaves = jax.tree.leaves_with_path(split(model)[1])
    assert all(isinstance(entry.key, str) for path, _ in leaves for entry in path)


def test_a_plain_tree_goes_through_split_and_merge_with_finite_gradients(model):
    graph, params = split(model)

    @jax.jit
    @jax.grad
    def gradient_of(params):
        outputs = forward(graph, True, params, (IDS, MASK), jax.random.key(0))
        return sum(jnp.mean(output**2) for output in jax.tree.leaves(outputs))

    gradient = gradient_of(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    kernels = [leaf for leaf in jax.tree.leaves(gradient) if leaf.ndim == 2]
    assert all(jnp.any(leaf != 0) for leaf in kernels)


def test_without_dropout_training_is_evaluation_and_needs_no_key(model):
    still = type(model)(STILL, rngs=nnx.Rngs(0))
    calm = first(run(still, IDS, MASK))
    np.testing.assert_array_equal(first(run(still, IDS, MASK, training=True)), calm)
    # The same weights: dropout has no part in drawing them.
    np.testing.assert_array_equal(first(run(model, IDS, MASK)), calm)


def test_evaluation_ignores_the_dropout_key(model):
    keyed, plain = run(model, IDS, MASK, seed=3), run(model, IDS, MASK)
    np.testing.assert_array_equal(first(keyed), first(plain))


def test_dropout_depends_on_the_key_alone(model):
    once, again, other = (
        first(run(model, IDS, MASK, training=True, seed=seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(once, again)
    assert not jnp.allclose(once, other)


@pytest.mark.parametrize(
    "rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"]
)
def test_each_dropout_acts_alone(rate):
    noisy = Bert(dataclasses.replace(STILL, **{rate: 0.5}), rngs=nnx.Rngs(0))
    calm = run(noisy, IDS, MASK).hidden
    assert not jnp.allclose(run(noisy, IDS, MASK, training=True, seed=0).hidden, calm)


def test_the_classifier_may_have_a_dropout_of_its_own():
    config = dataclasses.replace(STILL, classifier_dropout=0.5)
    noisy = BertForSequenceClassification(config, rngs=nnx.Rngs(0))
    calm = run(noisy, IDS, MASK)
    assert not jnp.allclose(run(noisy, IDS, MASK, training=True, seed=0), calm)
    # The encoder alone has none, so it asks for no key.
    run(noisy.bert, IDS, MASK, training=True)


def test_training_with_dropout_needs_a_key(model):
    with pytest.raises(ConfigError, match="dropout_key must be a key"):
        run(model, IDS, training=True)


def test_what_is_under_the_padding_changes_nothing_elsewhere():
    encoder = Bert(MINUTE, rngs=nnx.Rngs(0))
    other = jnp.where(MASK == 1, IDS, (IDS + 5) % 37)
    found = [run(encoder, ids, MASK) for ids in (IDS, other)]
    kept = np.asarray(MASK, bool)
    np.testing.assert_array_equal(*(np.asarray(x.hidden)[kept] for x in found))
    np.testing.assert_array_equal(*(x.pooled for x in found))
    assert not np.allclose(*(np.asarray(x.hidden)[~kept] for x in found))


def test_padding_equals_a_shorter_sequence():
    encoder = Bert(MINUTE, rngs=nnx.Rngs(0))
    padded = run(encoder, IDS, MASK).hidden[1:2, :4]
    # Sums over 4 and over 7 numbers may round differently.
    short = run(encoder, IDS[1:2, :4]).hidden
    np.testing.assert_allclose(padded, short, atol=1e-6)


def test_a_mask_of_zeros_gives_numbers():
    encoder = Bert(MINUTE, rngs=nnx.Rngs(0))
    assert jnp.isfinite(run(encoder, IDS, 0 * MASK).hidden).all()


def test_bfloat16_computes_close_by_with_float32_parameters_and_logits():
    exact, rough = (
        BertForQuestionAnswering(MINUTE, dtype=dtype, rngs=nnx.Rngs(0))
        for dtype in (None, jnp.bfloat16)
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(split(rough)[1]))
    assert run(rough.bert, IDS, MASK).hidden.dtype == jnp.bfloat16
    # Features are around 1 and bfloat16 holds 8 bits; kernels of 0.02 weigh them.
    for ours, theirs in zip(*(run(m, IDS, MASK) for m in (rough, exact)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_a_sequence_must_fit():
    with pytest.raises(ConfigError, match="max_position_embeddings=9 .*, got 10"):
        Bert(MINUTE, rngs=nnx.Rngs(0))(jnp.zeros((1, 10), int), training=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"hidden_size": 1.5}, "hidden_size must be a positive integer, got 1.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be in .0, 1., got 1"),
        ({"classifier_dropout": -0.1}, "classifier_dropout must be in .0, 1., got -0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be above 0, got 0"),
        ({"initializer_range": -1.0}, "initializer_range must be above 0, got -1"),
        ({"num_attention_heads": 5}, "must divide hidden_size=768, got 5"),
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
    ],
)
def test_a_configuration_is_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        BertConfig(**changes)
