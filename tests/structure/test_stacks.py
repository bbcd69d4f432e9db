"""Layers that are scanned, of which each loses channels of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_programs import evaluate
from structure import models
from structure.comparing import abstract, filled, masked

from cram_jax import compress
from cram_jax.structure import (
    channels,
    group_masks,
    kept_groups,
    shrink,
    small_apply,
    trace_structure,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def scanned(layer, shapes, outputs=None):
    """A model of three layers of one function ``(weights, x) -> (x, aside)``."""
    variables = {
        "layers": {name: models.array(3, *shape) for name, shape in shapes.items()}
    }

    def apply(params, x):
        x, aside = jax.lax.scan(lambda x, w: layer(w, x), x, params["layers"])
        return x if outputs is None else outputs(params, x, aside)

    return apply, variables, models.array(2, 4)


FFN = {"up": (4, 6), "bias": (6,), "down": (6, 4)}


def gated():
    """Fused gate and value, as in SwiGLU."""

    def layer(w, x):
        hidden = x @ w["up"]
        return x + (jax.nn.silu(hidden[:, :6]) * hidden[:, 6:]) @ w["down"], None

    return scanned(layer, {"up": (4, 12), "down": (6, 4)})


def feed_forward(activation):
    def layer(w, x):
        hidden = x @ w["up"] + w["bias"]
        return x + activation(hidden) @ w["down"], hidden

    return layer


def halves(x):
    return jnp.concatenate([jax.nn.relu(x[:, :3]), jnp.tanh(x[:, 3:])], axis=1)


def different(structure, family, count):
    """Every layer keeps another draw of so many groups."""
    rng = np.random.default_rng(3)
    kept = np.ones((family.layers, structure.size), bool)
    for row in kept:
        row[family.start + rng.permutation(family.size)[count:]] = False
    assert (kept[0] != kept[1]).any()
    return kept


@pytest.mark.parametrize(
    "model",
    [models.scan_nnx, models.scan_linen, models.scanned_functions, gated],
    ids=lambda model: model.__name__,
)
def test_each_layer_loses_its_own_channels(model):
    apply, variables, *inputs = model()
    structure = trace_structure(apply, variables, *inputs)
    (family,) = (f for f in structure.families if f.layers > 1)
    assert family.layers == 3
    kept = different(structure, family, family.size // 2)
    values, given = filled((structure.model.variables, structure.model.inputs))
    masks = group_masks(structure, kept)
    np.testing.assert_array_equal(kept_groups(structure, masks), kept)
    program = structure.model.analysis.program
    wanted = evaluate(program, jax.tree.leaves((masked(masks, values), given)))
    small = shrink(structure, values, masks)
    replayed = jax.make_jaxpr(small_apply(structure, kept))(
        abstract(small, structure.model.variables), *structure.model.inputs
    )
    got = evaluate(replayed, jax.tree.leaves((small, given)))
    for one, other in zip(wanted, got, strict=True):
        assert np.abs(one - other).max() < 1e-12 * max(1, np.abs(one).max())


@pytest.mark.parametrize(
    "model",
    [
        scanned(feed_forward(halves), FFN),
        scanned(feed_forward(lambda x: x * jnp.arange(6.0)), FFN),
        scanned(feed_forward(lambda x: x[:, ::-1]), FFN),
        # What a layer computes of its channels is used outside.
        scanned(feed_forward(jnp.tanh), FFN, lambda p, x, aside: x + aside.sum()),
        # The layers' weights meet outside of the scan.
        scanned(
            feed_forward(jnp.tanh),
            FFN,
            lambda p, x, aside: x + p["layers"]["bias"].mean(0) @ jnp.ones(6),
        ),
    ],
    ids=["halves", "positions", "reversed", "stacked outputs", "a mean over layers"],
)
def test_layers_that_are_not_free_to_differ_lose_the_same(model):
    structure = trace_structure(*model)
    assert all(family.layers == 1 for family in structure.families)


def test_channels_that_one_layer_hands_to_the_next_are_the_same_in_all():
    def apply(params, x):
        def layer(hidden, w):
            return jnp.tanh(hidden @ w["r"]), None

        hidden, _ = jax.lax.scan(layer, jnp.tanh(x @ params["in"]), params["layers"])
        return hidden @ params["out"]

    shapes = {"in": (4, 6), "out": (6, 2)}
    variables = {name: models.array(*shape) for name, shape in shapes.items()}
    variables["layers"] = {"r": models.array(3, 6, 6)}
    structure = trace_structure(apply, variables, models.array(2, 4))
    assert [family.layers for family in structure.families] == [1]
    with pytest.raises(ValueError, match=r"by_layer needs families .* got \[\]"):
        channels(0.5, structure, by_layer=True)


MODEL = scanned(feed_forward(jax.nn.relu), FFN)
STRUCTURE = trace_structure(*MODEL)
PARAMS = jax.tree.map(lambda x: x.astype(np.float32), filled(MODEL[1]))


def test_the_projector_keeps_the_best_of_each_layer():
    projector = channels(0.5, STRUCTURE, by_layer=True)
    params, masks = jax.jit(compress, static_argnums=1)(PARAMS, projector)
    kept = kept_groups(STRUCTURE, masks)
    norms = np.square(PARAMS["layers"]["up"].astype(float)).mean(axis=1)
    for row, norm in zip(kept, norms, strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(-norm)[:3])
    small = shrink(STRUCTURE, params, masks)
    assert small["layers"]["up"].shape == (3, 4, 3)
    x = np.ones((2, 4), np.float32)
    got = small_apply(STRUCTURE, masks)(small, x)
    np.testing.assert_allclose(got, MODEL[0](params, x), atol=1e-5)
    assert repr(projector) == "channels(0.5, structure, by_layer=True)"
    assert "6 groups in each of 3 layers of layers/bias[1]" in repr(STRUCTURE)


def test_rows_that_cannot_be_cut_are_refused():
    kept = np.ones((3, 6), bool)
    kept[0, 0] = False
    with pytest.raises(ValueError, match=r"in each layer, got \[5, 6, 6\] of f"):
        shrink(STRUCTURE, PARAMS, kept)
    with pytest.raises(ValueError, match="which is not one of 2 layers"):
        shrink(STRUCTURE, PARAMS, kept[:2])
    with pytest.raises(ValueError, match="one bool for each of 6 groups, got shape"):
        shrink(STRUCTURE, PARAMS, kept[:, :5])
