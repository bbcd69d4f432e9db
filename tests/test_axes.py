"""What axes are for: by the conventions of libraries, told, and heeded."""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import nnx

from cram_jax import (
    Axes,
    axes_of,
    compress,
    fake_quant,
    matching,
    n_m,
    prunable,
    sparsity_report,
    stacked,
    top_k,
)
from cram_jax.paths import named_leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
DENSE, CONVOLUTION = ("input", "output"), ("window", "window", "input", "output")


def roles(tree, axes=None):
    """The roles of every leaf that is prunable by default, by its path."""
    found = {
        path: (own.roles, own.assumed)
        for (path, _), own in zip(named_leaves(tree), axes_of(tree, axes), strict=True)
        if own.is_matrix
    }
    assert not any(assumed for _, assumed in found.values())
    return {path: own for path, (own, _) in found.items()}


ATTENTION = {
    "key/kernel": ("input", "output", "output"),
    "out/kernel": ("input", "input", "output"),
    "query/kernel": ("input", "output", "output"),
    "value/kernel": ("input", "output", "output"),
}


def test_axes_of_nnx_are_known_in_a_state_and_in_the_pure_tree():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.embed = nnx.Embed(5, 8, rngs=rngs)
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.general = nnx.LinearGeneral(8, (2, 4), rngs=rngs)

    state = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
    expected = {f"attention/{path}": own for path, own in ATTENTION.items()}
    expected["conv/kernel"] = CONVOLUTION
    expected["embed/embedding"] = ("lookup", "output")
    expected["general/kernel"] = ("input", "output", "output")
    assert roles(state) == expected
    assert roles(nnx.as_pure(state)) == expected


def test_axes_of_linen_are_known():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
            x = nn.DenseGeneral((2, 4), name="general")(x)
            x = nn.Conv(8, (3,), name="conv")(x.reshape(1, 3, 8))
            return nn.Embed(5, 8, name="embed").attend(x)

    variables = jax.eval_shape(Model().init, KEY, jnp.ones((1, 3, 8)))
    expected = {f"attention/{path}": own for path, own in ATTENTION.items()}
    expected["conv/kernel"] = ("window", "input", "output")
    expected["embed/embedding"] = ("lookup", "output")
    expected["general/kernel"] = ("input", "output", "output")
    assert roles(variables["params"]) == expected


def test_axes_of_haiku_are_known():
    def model(x, words):
        x = hk.Conv2DTranspose(5, 3)(hk.Conv2D(4, 3)(x))
        x = hk.BatchNorm(True, True, 0.9)(x, True)  # its scale is (1, 1, 1, 5)
        return hk.Linear(2)(x), hk.Embed(7, 3)(words)

    init = hk.transform_with_state(model).init
    params, _ = jax.eval_shape(init, KEY, jnp.ones((1, 8, 8, 3)), jnp.ones(3, int))
    assert roles(params) == {
        "conv2_d/w": CONVOLUTION,
        "conv2_d_transpose/w": ("window", "window", "output", "input"),
        "embed/embeddings": ("lookup", "output"),
        "linear/w": DENSE,
    }


def test_axes_of_equinox_are_known_by_the_types_of_its_layers():
    def model(key):
        return {
            "linear": eqx.nn.Linear(2, 3, key=key),
            "conv": eqx.nn.Conv2d(2, 3, 3, key=key),
            "embed": eqx.nn.Embedding(5, 3, key=key),
            "norm": eqx.nn.LayerNorm((2, 3)),
            "gru": eqx.nn.GRUCell(2, 3, key=key),
            "layers": eqx.filter_vmap(lambda key: eqx.nn.Linear(2, 3, key=key))(
                jax.random.split(key, 4)
            ),
        }

    params = eqx.filter(
        eqx.filter_eval_shape(model, KEY), lambda x: hasattr(x, "dtype")
    )
    assert roles(params) == {
        "conv/weight": ("output", "input", "window", "window"),
        "embed/weight": ("lookup", "output"),
        "gru/weight_hh": ("output", "input"),
        "gru/weight_ih": ("output", "input"),
        "layers/weight": ("stack", "output", "input"),
        "linear/weight": ("output", "input"),
    }


def test_what_is_not_known_is_assumed_and_marked():
    unknown, torch = axes_of([jnp.ones((3, 3, 3)), {"weight": jnp.ones((4, 2))}])
    assert unknown == Axes("window", "input", "output")
    assert torch == Axes("output", "input")
    assert unknown.assumed
    assert torch.assumed
    for own in (Axes("output", "input", "other"), Axes("stack", "output", "input")):
        (told,) = axes_of([jnp.ones((3, 3, 3))], lambda path, leaf, own=own: own)
        assert not told.assumed
        marked = Axes(*own.roles, assumed=True)
        (told,) = axes_of([jnp.ones((3, 3, 3))], [marked])
        assert told.assumed


def test_stacked_layers_are_told_and_the_rest_is_known():
    attention = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    )
    layers = jax.tree.map(
        lambda leaf: jnp.ones((3, *leaf.shape)),
        nnx.as_pure(nnx.state(attention, nnx.Param)),
    )
    params = {"layers": layers, "head": {"kernel": jnp.ones((8, 2))}}
    expected = {f"layers/{path}": ("stack", *own) for path, own in ATTENTION.items()}
    assert roles(params, stacked("^layers/")) == expected | {"head/kernel": DENSE}
    norm = {"layers": {"scale": jnp.ones((3, 4)), "bias": jnp.ones((3, 4))}}
    with pytest.raises(ValueError, match="chooses no leaf to prune"):
        prunable(norm, axes=stacked("layers"))
    nested = stacked("a", axis=(0, -1))
    assert axes_of({"a": jnp.ones((2, 3, 4, 5))}, nested) == [
        Axes("stack", "input", "output", "stack")
    ]


def test_a_bias_of_two_axes_tells_stacked_layers_or_two_output_axes():
    def axes_of_kernel(kernel, bias):
        params = {"kernel": jnp.ones(kernel), "bias": jnp.ones(bias)}
        return axes_of(params)[1]

    assert axes_of_kernel((3, 4, 8), (3, 8)) == Axes("stack", "input", "output")
    convolution = axes_of_kernel((5, 3, 3, 4, 8), (5, 8))
    assert convolution == Axes("stack", *CONVOLUTION)
    general = axes_of_kernel((6, 2, 4), (2, 4))
    assert general == Axes("input", "output", "output")
    either = axes_of_kernel((4, 4, 8), (4, 8))
    assert [general.assumed, either.assumed] == [False, True]
    assert axes_of_kernel((3, 6, 2, 4), (3, 2, 4)).assumed  # stacked attention


def test_a_bias_tells_that_the_outputs_come_before_the_inputs():
    transposed = nn.ConvTranspose(6, (3, 3), transpose_kernel=True)
    ordinary = nn.ConvTranspose(6, (3, 3))
    for layer, last in ((transposed, ("output", "input")), (ordinary, CONVOLUTION[2:])):
        x = jnp.ones((1, 5, 5, 4))
        params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        _, own = axes_of(params)
        assert (own.roles, own.assumed) == (
            ("window", "window", *last),
            layer is transposed,
        )
    for names in ("bias", "kernel"), ("b", "w"):
        sizes = dict(zip(names, ((6,), (6, 4)), strict=True))
        params = {name: jnp.ones(size) for name, size in sizes.items()}
        assert axes_of(params)[1] == Axes("output", "input")
        assert axes_of({"layer": params})[1] == Axes("output", "input")
    shared = {"bias": jnp.ones(1), "kernel": jnp.ones((1, 4))}
    assert axes_of(shared)[1] == Axes("input", "output")


def test_axes_may_be_a_tree_with_none_for_what_is_left_open():
    params = {"a": {"kernel": jnp.ones((4, 2))}, "b": {"kernel": jnp.ones((4, 2))}}
    tree = {"a": {"kernel": Axes("output", "input")}, "b": {"kernel": None}}
    assert axes_of(params, tree) == [Axes("output", "input"), Axes(*DENSE)]
    projector = n_m(1, 2, axes=tree)
    assert projector == n_m(1, 2, axes={"b": tree["b"], "a": tree["a"]})
    assert hash(projector) == hash(n_m(1, 2, axes=tree))
    masks = compress({"a": tree_of(4, 2), "b": tree_of(4, 2)}, projector).masks
    assert (masks["a"]["kernel"].sum(1) == 1).all()
    assert (masks["b"]["kernel"].reshape(2, 2, 2).sum(1) == 1).all()


def test_axes_may_be_a_tree_like_params_that_hold_none():
    for params in (
        {"a": jnp.ones((4, 2)), "b": None},
        eqx.filter(eqx.nn.MLP(4, 4, 8, 1, key=KEY), eqx.is_inexact_array),
    ):
        told = jax.tree.map(
            lambda x: Axes("output", "input") if x.ndim == 2 else Axes("other"), params
        )
        assert axes_of(params, told) == jax.tree.leaves(
            told, is_leaf=lambda x: isinstance(x, Axes)
        )


def tree_of(*shape):
    return {"kernel": jax.random.normal(KEY, shape)}


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        (lambda path, leaf: Axes("input"), ValueError, r"of 'kernel', .*\(4, 2\)"),
        (lambda path, leaf: "input", TypeError, "must tell Axes or None of 'kernel'"),
        (
            {"kernel": 1},
            TypeError,
            "axes must be a tree of Axes and None, got the leaf",
        ),
        ({"other": None}, ValueError, "axes, if it is not a function, must have the"),
        (stacked("", axis=2), ValueError, r"axis=2 of stacked\('', axis=2\) is none"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, error, message):
    with pytest.raises(error, match=message):
        axes_of(tree_of(4, 2), axes)


def test_roles_and_patterns_that_are_none_are_refused():
    with pytest.raises(ValueError, match="roles must be of .* got 'inputs'"):
        Axes("inputs")
    with pytest.raises(ValueError, match="pattern must be a regular expression, got"):
        stacked("(")
    with pytest.raises(TypeError, match="axis must be an integer, got 0.5"):
        stacked("", axis=0.5)


# A kernel of 8 inputs and 8 outputs, and other ways to lay it out.
LAYOUTS = {
    "outputs first": (Axes("output", "input"), lambda kernel: kernel.T),
    "query": (
        Axes("input", "output", "output"),
        lambda kernel: kernel.reshape(8, 2, 4),
    ),
    "out": (Axes("input", "input", "output"), lambda kernel: kernel.reshape(2, 4, 8)),
    "stack last": (
        Axes("input", "output", "stack"),
        lambda kernel: jnp.stack([kernel, 0.1 * kernel], -1),
    ),
}
PROJECTORS = (
    n_m(2, 4),
    fake_quant(4),
    fake_quant(3, symmetric=False, per="tensor"),
    top_k(0.7, scope="layer"),
    top_k(0.5, scope="layer", block=(4, 2)),
    top_k(0.5, scope="layer", block=(4, None)),
    top_k(0.75, scope="layer", block=(..., 1)),
)


@functools.partial(jax.jit, static_argnames="projectors")
def each_of(projectors, kernel):
    """What each projector makes of the kernel."""
    return [compress([kernel], projector).params[0] for projector in projectors]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_projector_does_the_same_in_every_layout(layout):
    axes, arrange = LAYOUTS[layout]
    kernel = jax.random.normal(KEY, (8, 8))
    told = (dataclasses.replace(p, axes=lambda path, leaf: axes) for p in PROJECTORS)
    found, plain = each_of((*told,), arrange(kernel)), each_of(PROJECTORS, kernel)
    for ours, expected in zip(found, plain, strict=True):
        np.testing.assert_allclose(ours, arrange(expected), rtol=1e-5)


def test_stacked_layers_are_compressed_as_one_by_one():
    rng = np.random.default_rng(1)
    spread = np.array([1, 0.02, 0.3, 0.1])[:, None, None]
    layers = jnp.asarray(rng.normal(size=(4, 8, 6)) * spread, jnp.float32)
    projectors = (*PROJECTORS, fake_quant(3, clip="least_squares"))
    told = (dataclasses.replace(p, axes=stacked("")) for p in projectors)
    found = each_of((*told,), layers)
    one_by_one = zip(*(each_of(projectors, layer) for layer in layers), strict=True)
    for ours, expected in zip(found, one_by_one, strict=True):
        np.testing.assert_allclose(ours, jnp.stack(expected), rtol=1e-5)


def test_attention_is_grouped_along_inputs_and_scaled_by_output():
    kernel = jax.random.normal(KEY, (8, 2, 4))
    params = {
        name: {"kernel": kernel if name != "out" else kernel.reshape(2, 4, 8)}
        for name in ("query", "key", "value", "out")
    }
    masks = compress(params, n_m(2, 4)).masks
    rounded = compress(params, fake_quant(4)).params
    for name, (inputs, outputs) in (("query", (8, 8)), ("out", (8, 8))):
        plain = np.asarray(params[name]["kernel"]).reshape(inputs, outputs)
        mask = masks[name]["kernel"].reshape(inputs, outputs)
        np.testing.assert_array_equal(mask, references.n_m(plain, 2, 4))
        np.testing.assert_allclose(
            rounded[name]["kernel"].reshape(inputs, outputs),
            references.fake_quant(plain, 4),
            atol=1e-6,
        )


def test_rows_of_a_lookup_table_have_scales_and_are_in_no_group():
    table = jax.random.normal(KEY, (8, 4)) * 10.0 ** jnp.arange(8)[:, None]
    params = {"embed": {"embedding": table}, "head": {"kernel": table}}
    (rounded,) = compress(
        [table], fake_quant(4, axes=[Axes("lookup", "output")])
    ).params
    np.testing.assert_allclose(
        rounded, references.fake_quant(np.asarray(table).T, 4).T, rtol=1e-5
    )
    for projector in (n_m(2, 4), top_k(0.5, block=(4, 2))):
        masks = compress(params, projector).masks
        assert masks["embed"]["embedding"].all()
        assert int(masks["head"]["kernel"].sum()) == 16


def test_n_m_with_a_stride_groups_what_lies_apart():
    kernel = jax.random.normal(KEY, (16, 3))
    # Inputs i, i + 2, i + 4, i + 6 of every 8 are the neighbours of this one.
    neighbours = kernel.reshape(2, 4, 2, 3).swapaxes(1, 2).reshape(16, 3)
    expected = references.n_m(neighbours, 2, 4)
    expected = expected.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    mask = compress([kernel], n_m(2, 4, stride=2)).masks[0]
    np.testing.assert_array_equal(mask, expected)


def test_a_kernel_whose_inputs_the_stride_does_not_fill_stays_dense():
    params = {"a": jnp.ones((8, 3)), "b": jnp.ones((12, 3))}
    projector = n_m(2, 4, stride=2)
    pruned, masks = compress(params, projector)
    assert int(masks["a"].sum()) == 12
    assert masks["b"].all()
    left_dense = sparsity_report(pruned, masks, projector).leaves[1]
    assert left_dense.note == "dense: 8 does not divide its 12 inputs"


@dataclasses.dataclass
class Projections:
    """Not NNX: a parameter that is called value."""

    query: jax.Array
    value: jax.Array


jax.tree_util.register_dataclass(Projections, ["query", "value"], [])


def test_only_variables_of_nnx_are_called_like_their_values():
    kernel = jnp.ones((2, 2))
    params = {"attention": Projections(kernel, kernel)}
    assert [path for path, _ in named_leaves(params)] == [
        "attention/query",
        "attention/value",
    ]
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    assert [path for path, _ in named_leaves(state)] == ["bias", "kernel"]


def test_metadata_of_linen_is_looked_through():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, words):
            normal, split = nn.initializers.normal(), nn.with_partitioning
            table = nn.with_logical_partitioning(normal, (None, "model"))
            x = nn.Embed(8, 8, name="embed", embedding_init=table)(words)
            kernel = split(normal, ("model", None))
            return nn.Dense(4, name="dense", kernel_init=kernel)(x)

    boxed = Model().init(KEY, jnp.zeros(2, int))["params"]
    params = nn.meta.unbox(boxed)
    paths = ["dense/bias", "dense/kernel", "embed/embedding"]
    assert [path for path, _ in named_leaves(boxed)] == paths
    assert axes_of(boxed) == axes_of(params)
    pruned, masks = compress(boxed, n_m(2, 4))
    assert masks["embed"]["embedding"].unbox().all()
    assert jax.tree.structure(pruned) == jax.tree.structure(boxed)
    expected = compress(params, n_m(2, 4)).params
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(pruned), expected)


class Named:
    """A node registered without keys, whose items have names."""

    def __init__(self, **children):
        self.children = children

    def __getitem__(self, name):
        return self.children[name]


jax.tree_util.register_pytree_node(
    Named,
    lambda node: (tuple(node.children.values()), tuple(node.children)),
    lambda names, values: Named(**dict(zip(names, values, strict=True))),
)


def test_children_of_nodes_without_keys_are_unknown():
    layer = eqx.nn.Linear(2, 3, key=KEY)
    assert [own.roles for own in axes_of(Named(layer=layer))] == [
        ("output", "input"),
        ("other",),
    ]


def test_filters_choose_alike_in_a_state_and_in_the_pure_tree():
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
    pure = nnx.as_pure(state)
    is_kernel = jax.tree.map(lambda leaf: leaf.ndim == 2, state)
    for where in (matching("^kernel$"), is_kernel, {"bias": False, "kernel": True}):
        assert prunable(state, where) == prunable(pure, where) == [False, True]
