"""Masks of RigL and SET, and PLATON's scores, beside NumPy that follows the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cram_jax import Step, pruned
from experiments.methods.dynamic import annealed, kept_by_layer, rigl
from experiments.methods.platon import platon

pytestmark = pytest.mark.usefixtures("quick_compilation")

generator = np.random.default_rng(0)
SHAPES = {"first": (6, 5), "second": (5, 4)}
PARAMS = {name: generator.normal(size=shape) for name, shape in SHAPES.items()}
GRADS = {name: generator.normal(size=shape) for name, shape in SHAPES.items()}


def as_step(count, params=PARAMS, grads=GRADS):
    floats = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, grads))
    return Step(jnp.asarray(count), *floats, jax.random.key(3))


def test_rigl_drops_small_weights_and_grows_large_gradients():
    """Evci et al., algorithm 1, layer by layer."""
    rule = rigl(0.6, replaced=0.4)
    masks, state = rule.init(jax.tree.map(jnp.asarray, PARAMS), jax.random.key(0))
    renewed, _ = rule.renew(masks, state, as_step(100))
    for name, mask in masks.items():
        mask = np.asarray(mask).ravel()
        weights, grads = np.abs(PARAMS[name]).ravel(), np.abs(GRADS[name]).ravel()
        active = np.flatnonzero(mask)
        dropped = int(0.4 * len(active))
        order = active[np.argsort(-weights[active])]
        kept = order[: len(active) - dropped]
        others = np.setdiff1d(np.arange(mask.size), kept)
        grown = others[np.argsort(-grads[others])][:dropped]
        expected = np.zeros(mask.size, bool)
        expected[np.concatenate([kept, grown])] = True
        np.testing.assert_array_equal(np.asarray(renewed[name]).ravel(), expected)


def test_set_keeps_the_largest_and_the_number():
    rule = rigl(0.6, replaced=0.5, grow="random")
    masks, state = rule.init(jax.tree.map(jnp.asarray, PARAMS), jax.random.key(0))
    renewed, _ = rule.renew(masks, state, as_step(100))
    for name, mask in masks.items():
        assert renewed[name].sum() == mask.sum()
        assert (renewed[name] != mask).any()
        weights = np.where(mask, np.abs(PARAMS[name]), 0).ravel()
        number = int(mask.sum()) - int(mask.sum()) // 2
        assert np.asarray(renewed[name]).ravel()[np.argsort(-weights)[:number]].all()


def test_set_grows_anywhere_in_bfloat16_too():
    """The mean place of 50 renewals is the middle; ties would draw it to the front."""
    rule = rigl(0.5, replaced=0.5, grow="random")
    weights = {"w": jnp.ones((32, 32), jnp.bfloat16)}
    masks, state = rule.init(weights, jax.random.key(0))
    masks = {"w": jnp.arange(1024).reshape(32, 32) % 2 == 0}

    @jax.jit
    def grown(key):
        step = as_step(1)._replace(params=weights, gradients=weights, key=key)
        renewed, _ = rule.renew(masks, state, step)
        return jnp.sum(jnp.where(renewed["w"] & ~masks["w"], 1.0, 0.0).ravel() * places)

    places = (jnp.arange(1024) - 511.5) / 256
    means = [float(grown(jax.random.key(seed))) / 256 for seed in range(50)]
    # A place has a deviation of 1.15; the mean of 50 times 256 of them one of 0.01.
    assert abs(np.mean(means)) < 0.05


def test_new_weights_begin_at_zero_without_momentum():
    optimizer = pruned(optax.sgd(0.1, momentum=0.9), rigl(0.5), every=2)
    params = as_step(0).params
    state = optimizer.init(params)
    params = jax.tree.map(lambda m, leaf: jnp.where(m, leaf, 0), state.masks, params)
    grads = as_step(0).gradients
    for _ in range(2):
        before = state.masks
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    (momentum,) = (state.inner_state[0].trace,)
    for name in SHAPES:
        new = state.masks[name] & ~before[name]
        assert new.any()
        assert not params[name][new].any()
        assert not momentum[name][new].any()
        assert momentum[name][state.masks[name] & before[name]].all()


def test_densities_of_erdos_renyi_kernel():
    """Sum of dimensions over their product, layers above 1 dense; by the equations."""
    shapes = [(3, 3, 3, 16), (3, 3, 16, 64), (64, 10)]
    sizes = np.array([432, 9216, 640])
    raw = np.array([25 / 432, 86 / 9216, 74 / 640])
    sparse = kept_by_layer(shapes, 0.98)
    scale = 0.02 * sizes.sum() / (raw * sizes).sum()
    # Counts are rounded.
    np.testing.assert_allclose(sparse, scale * raw * sizes, atol=0.5)
    assert kept_by_layer(shapes, 0.5, "uniform") == [216, 4608, 320]
    # Small layers at a mild sparsity are dense, the others share what is left.
    mild = kept_by_layer(shapes, 0.3)
    assert mild[0] == 432
    assert mild[2] == 640
    assert abs(sum(mild) - 0.7 * sizes.sum()) <= 2


def test_the_share_replaced_falls_along_half_a_cosine():
    schedule = annealed(0.3, 100)
    found = [float(schedule(t)) for t in (0, 50, 100, 500)]
    np.testing.assert_allclose(found, [0.3, 0.15, 0, 0], atol=1e-7)


def test_platon_scores_and_masks():
    """Zhang et al.: windows of 3, in the order of the authors' code."""
    window, final, steps = 3, 9, 12
    rule = platon(lambda t: jnp.where(t < 2, 0.0, 0.5), window=window, final=final)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), PARAMS)
    masks, state = rule.init(params, jax.random.key(0))
    names = list(SHAPES)
    j = {name: np.zeros(SHAPES[name]) for name in names}
    mean = {name: np.zeros(SHAPES[name]) for name in names}
    doubt = {name: np.zeros(SHAPES[name]) for name in names}
    draw = np.random.default_rng(1)
    watch, renew = jax.jit(rule.watch), jax.jit(rule.renew)
    for t in range(steps):
        w = {name: draw.normal(size=SHAPES[name]) for name in names}
        g = {name: draw.normal(size=SHAPES[name]) for name in names}
        for name in names:
            sensitivity = np.abs(w[name] * g[name])
            if t % window == 0:
                mean[name] = 0.85 * mean[name] + 0.15 * j[name]
                doubt[name] = 0.95 * doubt[name] + 0.05 * np.abs(j[name] - mean[name])
                j[name] = sensitivity
            else:
                place = t % window
                j[name] = (j[name] * place + sensitivity) / (place + 1)
        step = as_step(t + 1, w, g)
        state = watch(state, step)
        masks, state = renew(masks, state, step)
        scores = np.concatenate([(mean[n] * doubt[n]).ravel() for n in names])
        expected = np.ones(50, bool)
        if t >= 2 and (t % window == 0 or t >= final):
            expected[np.argsort(scores, kind="stable")[:25]] = False
        found = np.concatenate([np.asarray(masks[name]).ravel() for name in names])
        np.testing.assert_array_equal(found, expected)
