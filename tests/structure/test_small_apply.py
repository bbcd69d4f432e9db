"""The smaller network as a function: what can be done with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax import compress
from cram_jax.structure import (
    channels,
    check_apply,
    group_masks,
    shrink,
    small_apply,
    trace_structure,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
PARAMS = {
    name: RNG.normal(size=shape).astype(np.float32)
    for name, shape in {"a": (3, 8), "b": (8,), "c": (8, 2)}.items()
}
X = RNG.normal(size=(4, 3)).astype(np.float32)
KEPT = np.array([True, False, True, True, False, False, True, False])


def network(activation):
    def apply(params, x):
        return activation(x @ params["a"] + params["b"]) @ params["c"]

    return apply


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.custom_jvp
def with_twice_the_slope(x):
    return jnp.tanh(x)


with_twice_the_slope.defjvps(lambda t, out, x: 2 * t * (1 - out**2))


@jax.custom_vjp
def to_a_power(x, exponent):
    return x**exponent


to_a_power.defvjp(
    lambda x, exponent: (x**exponent, (x, exponent)),
    lambda saved, g: (3 * g * saved[0] ** (saved[1] - 1), None),
)


def masked_and_small(apply, params=PARAMS, x=X, kept=KEPT):
    structure = trace_structure(apply, params, x)
    masks = group_masks(structure, kept)
    masked = jax.tree.map(lambda m, p: np.where(m, p, 0), masks, params)
    return structure, masked, shrink(structure, params, kept)


@pytest.mark.parametrize(
    "activation",
    [
        jax.nn.relu,
        jax.nn.gelu,
        straight_through,
        with_twice_the_slope,
        lambda x: to_a_power(x, jnp.array(2)),
    ],
    ids=["relu", "gelu", "straight through", "custom_jvp", "with an integer"],
)
def test_gradients_keep_the_models_own_rules(activation):
    apply = network(activation)
    structure, masked, small = masked_and_small(apply)
    function = small_apply(structure, KEPT)

    def loss(function, params, x):
        return jnp.sum(function(params, x) ** 2)

    got = jax.jit(jax.grad(lambda p: loss(function, p, X)))(small)
    want = jax.jit(jax.grad(lambda p: loss(apply, p, X)))(masked)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        got,
        shrink(structure, want, KEPT),
    )


def test_relu_at_zero_keeps_its_gradient_of_zero():
    params = {"a": np.zeros((3, 8)), "b": np.zeros(8), "c": np.ones((8, 2))}
    structure, _, small = masked_and_small(network(jax.nn.relu), params)
    function = small_apply(structure, KEPT)
    gradient = jax.grad(lambda p: jnp.sum(function(p, X)))(small)
    # Without its rule the gradient of max(x, 0) at 0 is 1/2.
    assert not np.any(gradient["b"])


def test_other_batch_sizes_and_dtypes_retrace():
    apply = network(jax.nn.relu)
    structure, masked, small = masked_and_small(apply)
    function = jax.jit(small_apply(structure, KEPT))
    x = RNG.normal(size=(2, 9, 3)).astype(np.float32)
    np.testing.assert_allclose(function(small, x), apply(masked, x), atol=1e-5)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), small)
    assert function(half, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_an_empty_batch_may_be_reshaped():
    def apply(params, x):
        pairs = (x @ params["a"]).reshape(*x.shape[:-1], 4, 2).max(-1)
        flat = pairs.reshape(-1, 4) @ params["c"]
        return flat.reshape(*x.shape[:-1], 2)

    params = {"a": PARAMS["a"], "c": PARAMS["c"][:4]}
    structure = trace_structure(apply, params, X[None])
    kept = np.array([True, False, True, False])
    small = shrink(structure, params, kept)
    assert small_apply(structure, kept)(small, jnp.ones((0, 4, 3))).shape == (0, 4, 2)
    assert small_apply(structure, kept)(small, jnp.ones((2, 0, 3))).shape == (2, 0, 2)


def test_vmap_and_export():
    apply = network(jnp.tanh)
    structure, masked, small = masked_and_small(apply)
    function = small_apply(structure, KEPT)
    stack = np.stack([X, 2 * X])
    got = jax.vmap(function, (None, 0))(small, stack)
    np.testing.assert_allclose(got[1], apply(masked, 2 * X), atol=1e-5)
    exported = jax.export.export(jax.jit(function))(small, X)
    np.testing.assert_allclose(exported.call(small, X), apply(masked, X), atol=1e-5)


def test_dropout_draws_what_the_dense_model_draws():
    def apply(params, x, key):
        hidden = jax.nn.relu(x @ params["a"] + params["b"])
        hidden = jnp.where(jax.random.bernoulli(key, 0.5, hidden.shape), hidden, 0)
        return hidden @ params["c"]

    key = jax.random.key(3)
    structure = trace_structure(apply, PARAMS, X, key)
    masks = group_masks(structure, KEPT)
    masked = jax.tree.map(lambda m, p: np.where(m, p, 0), masks, PARAMS)
    small = shrink(structure, PARAMS, KEPT)
    got = small_apply(structure, KEPT)(small, X, key)
    np.testing.assert_allclose(got, apply(masked, X, key), atol=1e-5)


def test_new_batch_statistics_come_out_smaller():
    def apply(variables, x):
        params, mean = variables["params"], variables["mean"]
        hidden = x @ params["a"]
        batch_mean = hidden.mean(0)
        out = jax.nn.relu(hidden - batch_mean + params["b"]) @ params["c"]
        return out, 0.9 * mean + 0.1 * batch_mean

    variables = {"params": PARAMS, "mean": np.ones(8, np.float32)}
    assert trace_structure(apply, variables, X).size == 0
    structure = trace_structure(apply, variables, X, outputs=lambda out: out[0])
    assert structure.size == 8
    masks = group_masks(structure, KEPT)
    masked = jax.tree.map(lambda m, v: np.where(m, v, 0), masks, variables)
    small = shrink(structure, variables, KEPT)
    out, mean = small_apply(structure, KEPT)(small, X)
    wanted, dense_mean = apply(masked, X)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    np.testing.assert_allclose(mean, dense_mean[KEPT], atol=1e-5)


def test_rematerialisation_is_kept():
    apply = jax.checkpoint(network(jax.nn.relu))
    structure, _, small = masked_and_small(apply)
    program = str(jax.make_jaxpr(small_apply(structure, KEPT))(small, X))
    assert "checkpoint" in program or "remat" in program


def test_loops_and_branches_are_made_smaller():
    params = {**PARAMS, "r": RNG.normal(size=(8, 8)).astype(np.float32)}

    def apply(params, x):
        hidden = jnp.tanh(x @ params["a"])
        hidden = jax.lax.fori_loop(
            0, 3, lambda i, h: jnp.tanh(h @ params["r"] + params["b"]), hidden
        )
        _, hidden = jax.lax.while_loop(
            lambda state: state[0] < 2,
            lambda state: (state[0] + 1, jnp.tanh(state[1] @ params["r"])),
            (0, hidden),
        )
        hidden = jax.lax.cond(x.sum() > 0, lambda h: h * params["b"], jnp.abs, hidden)
        return hidden @ params["c"]

    structure, masked, small = masked_and_small(apply, params)
    got = small_apply(structure, KEPT)(small, X)
    np.testing.assert_allclose(got, apply(masked, X), atol=1e-5)


def test_variables_of_the_dense_model_are_refused():
    structure, _, _ = masked_and_small(network(jax.nn.relu))
    with pytest.raises(ValueError, match=r"\['a'\] must have the shape \(3, 4\), as"):
        small_apply(structure, KEPT)(PARAMS, X)


def test_what_was_projected_is_what_shrinks():
    apply = network(jax.nn.relu)
    structure = trace_structure(apply, PARAMS, X)
    pruned = compress(PARAMS, channels(0.5, structure))
    small = shrink(structure, pruned.params, pruned.masks)
    got = small_apply(structure, pruned.masks)(small, X)
    np.testing.assert_allclose(got, apply(pruned.params, X), atol=1e-5)


def test_fine_tuning_goes_down():
    apply = network(jax.nn.relu)
    structure, _, small = masked_and_small(apply)
    function = small_apply(structure, KEPT)
    teacher = apply(PARAMS, X)

    @jax.jit
    def step(params):
        def loss(params):
            return jnp.mean((function(params, X) - teacher) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)

    losses = []
    for _ in range(20):
        value, small = step(small)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_a_pad_may_grow_one_end_and_crop_the_other():
    """As a shift by one token does."""

    def apply(params, x):
        h = jax.nn.relu(x @ params["a"])
        shifted = jax.lax.pad(h, 0.0, ((0, 0, 0), (1, -1, 0), (0, 0, 0)))
        return (h + shifted) @ params["c"]

    params, x = {name: PARAMS[name] for name in "ac"}, RNG.normal(size=(2, 5, 3))
    structure = trace_structure(apply, params, x)
    masked = compress(params, channels(0.5, structure))
    kept = channels(0.5, structure).keep(params)
    small = small_apply(structure, kept)(shrink(structure, params, kept), x)
    np.testing.assert_allclose(small, apply(masked.params, x), rtol=1e-5, atol=1e-6)


def stacked_halves(params, x):
    """Interleaved, as rotary embeddings are."""
    h = x @ params["a"] + params["b"]
    turned = jnp.stack([-h[:, 1::2], h[:, 0::2]], -1).reshape(h.shape)
    return turned @ params["c"]


def tiled(params, x):
    h = jnp.tile(jax.nn.relu(x @ params["a"]), (1, 2))
    return h @ jnp.concatenate([params["c"], 2 * params["c"]])


def unstacked(params, x):
    h = jax.nn.relu(x @ params["a"])
    first, *others = jnp.unstack(jnp.stack([h, 2 * h, h - 1], 1), axis=1)
    return sum(others, first) @ params["c"]


def complex_parts(params, x):
    h = jax.nn.relu(x @ params["a"])
    turned = jax.lax.complex(h, 2 * h) * jnp.exp(0.3j)
    return (turned.real + turned.imag) @ params["c"]


def summed_along_tokens(params, x):
    h = jnp.cumsum(jax.nn.relu(x @ params["a"]), axis=0)
    return h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) * 8 + 1) @ params["c"]


def with_empty_parts(params, x):
    h = jnp.concatenate([jnp.zeros((len(x), 0)), jax.nn.relu(x @ params["a"])], -1)
    return h @ params["c"] + (x[:, :0] @ params["a"][:0]).sum()


@pytest.mark.parametrize(
    ("apply", "groups"),
    [
        (with_empty_parts, 8),
        (stacked_halves, 4),
        (tiled, 8),
        (unstacked, 8),
        (complex_parts, 8),
        (summed_along_tokens, 8),
    ],
)
def test_the_smaller_network_computes_what_the_masked_one_does(apply, groups):
    params = PARAMS | {"none": np.zeros((0, 3), np.float32)}
    structure = trace_structure(apply, params, X)
    assert structure.size == groups
    masked = compress(params, channels(0.5, structure)).params
    kept = channels(0.5, structure).keep(params)
    assert kept.sum() == groups // 2
    small = small_apply(structure, kept)(shrink(structure, params, kept), X)
    np.testing.assert_allclose(small, apply(masked, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "size"),
    # Of a depthwise convolution, half of each of the four groups may go, too.
    [(1, 8, 8, 4 + 2), (1, 16, 8, 4 + 2), (2, 8, 4, 4), (4, 4, 2, 2)],
)
def test_whole_groups_go_where_a_norm_of_groups_meets_a_grouped_convolution(
    inputs, outputs, groups, size
):
    def norm_of_groups(x):
        split = x.reshape(*x.shape[:-1], 2 if groups == 2 else 4, -1)
        return (split / (jnp.abs(split).sum(-1, keepdims=True) + 1)).reshape(x.shape)

    def apply(params, x):
        h = norm_of_groups(jax.nn.relu(x @ params["a"]))
        h = jax.lax.conv_general_dilated(
            h, params["w"], (1,), "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups,
        )  # fmt: skip
        return norm_of_groups(h) @ params["c"]

    shapes = {"a": (3, 8), "w": (3, inputs, outputs), "c": (outputs, 2)}
    params = {name: RNG.normal(size=shape) for name, shape in shapes.items()}
    x = RNG.normal(size=(2, 5, 3))
    structure = trace_structure(apply, params, x)
    assert structure.size == size
    kept = np.arange(structure.size) % 2 == 1
    masks = group_masks(structure, kept)
    masked = jax.tree.map(lambda mask, leaf: jnp.where(mask, leaf, 0), masks, params)
    small = small_apply(structure, kept)(shrink(structure, params, kept), x)
    np.testing.assert_allclose(small, apply(masked, x), rtol=1e-4, atol=1e-5)


def test_all_channels_of_a_grouped_convolution_may_go():
    """Half of a family passes a blur whose kernel is a constant."""
    layout = ("NHWC", "HWIO", "NHWC")

    def apply(params, x):
        h = jax.nn.relu(x @ params["a"])
        blurred = jax.lax.conv_general_dilated(
            h[..., :4],
            np.full((2, 2, 1, 4), 0.25, np.float32),
            (1, 1),
            "SAME",
            dimension_numbers=layout,
            feature_group_count=4,
        )
        return jnp.concatenate([blurred, h[..., 4:]], -1) @ params["c"]

    params, x = {name: PARAMS[name] for name in "ac"}, RNG.normal(size=(2, 5, 5, 3))
    kept = np.arange(8) >= 4
    structure, masked, small = masked_and_small(apply, params, x, kept)
    got = small_apply(structure, kept)(small, x)
    np.testing.assert_allclose(got, apply(masked, x), rtol=1e-5, atol=1e-6)


def test_a_branch_is_chosen_by_the_model_as_by_its_replay():
    def apply(params, x, index):
        activations = [jax.nn.relu, jnp.tanh, lambda h: h]
        return jax.lax.switch(index, activations, x @ params["a"]) @ params["c"]

    structure = trace_structure(apply, PARAMS, X, jnp.int32(1))
    assert check_apply(structure, KEPT) is None
    other = [jnp.tanh, jax.nn.relu, lambda h: h]
    reason = check_apply(
        structure,
        KEPT,
        apply=lambda p, x, i: jax.lax.switch(i, other, x @ p["a"]) @ p["c"],
    )
    assert reason is not None


def test_what_is_printed_may_shrink(capsys):
    seen = []

    def relu(x):
        x = jax.nn.relu(x)
        jax.debug.print("sum {}", x.sum(), ordered=True)
        jax.debug.callback(lambda x: seen.append(np.shape(x)), x)
        return x

    apply = network(relu)
    structure, masked, small = masked_and_small(apply)
    want = apply(masked, X)
    seen.clear()
    got = small_apply(structure, KEPT)(small, X)
    jax.effects_barrier()
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert seen == [(4, 4)]
    sums = [float(line[4:]) for line in capsys.readouterr().out.split("\n")[:2]]
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-4)
