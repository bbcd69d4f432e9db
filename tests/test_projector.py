import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import cram_jax
from cram_jax import (
    Projection,
    cached,
    compose,
    compress,
    cram_plus,
    fake_quant,
    identity,
    n_m,
    one_of,
    stateless,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}


def masks_like(params):
    return jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), params)


def test_a_stateless_projector_is_its_function():
    def halve(params, key):
        assert key is not None
        return Projection(jax.tree.map(lambda p: p / 2, params), masks_like(params))

    projector = stateless(halve, "halve")
    projection, state = projector.project(
        PARAMS, projector.init(PARAMS), jax.random.key(0)
    )
    assert repr(projector) == "halve"
    assert state == ()
    assert (projection.params["kernel"] == 0.5).all()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda params, key: params, TypeError, "wrong must return a Projection"),
        (
            lambda params, key: Projection(params["kernel"], masks_like(params)),
            ValueError,
            "params from projector wrong must have the structure",
        ),
        (
            lambda params, key: Projection(
                jax.tree.map(lambda p: p.astype(jnp.bfloat16), params),
                masks_like(params),
            ),
            ValueError,
            r"wrong must return params of shape \(3,\) and dtype float32 at 'bias'",
        ),
        (
            lambda params, key: Projection(params, jax.tree.map(jnp.ones_like, params)),
            ValueError,
            r"wrong must return masks of shape \(3,\) and dtype bool at 'bias', got",
        ),
        (
            lambda params, key: Projection(
                params, jax.tree.map(lambda p: jnp.array(True), params)
            ),
            ValueError,
            r"wrong must return masks of shape \(3,\) and dtype bool at 'bias', got"
            r" \(\)",
        ),
    ],
)
def test_a_projection_that_breaks_the_contract_is_refused_at_init(
    function, error, message
):
    with pytest.raises(error, match=message):
        stateless(function, "wrong").init(PARAMS)


def test_a_projector_needs_no_values_at_init():
    abstract = jax.eval_shape(lambda: PARAMS)
    assert identity().init(abstract) == ()


WRITTEN = [
    "identity()",
    "top_k(0.9)",
    "top_k(0.9, scope='layer', block=(4, 2))",
    "top_k(0.5, block=(..., 1), pad=True, where=all_but('^head/'))",
    "top_k(0.5, where={'a': True, 'b': False})",
    "n_m(2, 4)",
    "n_m(2, 4, stride=16, axes=stacked('^layers/', axis=1))",
    "n_m(1, 2, axes={'a': Axes('output', 'input')})",
    "fake_quant(4)",
    "fake_quant(4, symmetric=False, per='tensor', clip='least_squares')",
    "one_of(top_k(0.5), cached(n_m(2, 4), every=20))",
    "one_of(top_k(0.5), identity(), probabilities=(0.25, 0.75))",
    "compose(top_k(0.5, where=matching('kernel$')), fake_quant(4))",
]


def written(text):
    return eval(text, vars(cram_jax))


@pytest.mark.parametrize("text", WRITTEN)
def test_projectors_print_as_they_were_written_and_compare_by_it(text):
    projector = written(text)
    assert repr(projector) == text
    assert projector == written(text)
    assert hash(projector) == hash(written(text))
    assert [written(other) == projector for other in WRITTEN].count(True) == 1


def test_sparsities_that_print_alike_are_one():
    assert top_k(np.float32(0.9)) == top_k(jnp.float32(0.9)) == top_k(0.9)
    assert repr(top_k(np.array(0.29, np.float32))) == "top_k(0.29)"


def test_a_projector_is_a_static_argument():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def kept(kernel, projector):
        traces.append(projector)
        return compress([kernel], projector).masks[0].sum()

    kernel = jnp.arange(16.0).reshape(4, 4)
    for sparsity in (0.25, 0.25, 0.5):
        assert kept(kernel, top_k(sparsity, where=cram_jax.matching("0"))) == 16 * (
            1 - sparsity
        )
    assert len(traces) == 2


def test_a_traced_sparsity_equals_itself_only():
    @jax.jit
    def compare(sparsity):
        one = top_k(sparsity)
        assert repr(one) == "top_k(traced)"
        assert one == one
        assert hash(one) == hash(one)
        assert one != top_k(sparsity)
        return compress([jnp.arange(16.0).reshape(4, 4)], one).masks[0].sum()

    assert compare(0.75) == 4


def test_own_projectors_compare_by_function_and_label():
    def function(params, key):
        return Projection(params, masks_like(params))

    assert stateless(function, "a") == stateless(function, "a")
    assert stateless(function, "a") != stateless(function, "b")
    assert stateless(function, "a") != stateless(lambda p, key: function(p, key), "a")


MEMBERS = [
    top_k(0.5),
    n_m(1, 2),
    fake_quant(4),
    identity(),
    cached(top_k(0.5), every=3),
    one_of(cached(top_k(0.5), every=3), cached(n_m(1, 2), every=2)),
    compose(cached(top_k(0.5), every=3), fake_quant(4)),
]


@pytest.mark.parametrize("projector", MEMBERS, ids=repr)
def test_optax_tells_parameters_from_the_rest_of_a_state(projector):
    params = {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}
    optimizer = optax.chain(
        cram_plus(lambda params: jnp.sum(params["kernel"]), projector), optax.adam(0.1)
    )
    state = optimizer.init(params)
    mapped = optax.tree.map_params(
        optimizer, lambda leaf, param: leaf + param, state, params
    )
    # Adam's moments are like the parameters; bits of masks are not.
    assert jax.tree.all(jax.tree.map(lambda leaf: (leaf == 1).all(), mapped[1][0].mu))
    before, after = (s[0].projector_state for s in (state, mapped))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_ranks_may_be_promoted_nowhere_and_infinities_raise():
    params = {"kernel": jnp.ones((3, 2, 4)), "bias": jnp.ones(4)}

    @jax.jit
    def run(params):
        return [compress(params, p, key=jax.random.key(0)) for p in MEMBERS]

    with jax.numpy_rank_promotion("raise"), jax.debug_infs(True):
        run(params)
        for projector in MEMBERS:
            projector.init(params)


def test_shapes_may_be_symbolic_where_nothing_is_counted():
    def shapes():
        return [jax.ShapeDtypeStruct(export.symbolic_shape("a, 4*b"), jnp.float32)]

    kernel = jax.random.normal(jax.random.key(0), (6, 8))
    for projector in (fake_quant(4), identity(), n_m(2, 4, axes=outputs_first)):
        run = jax.jit(lambda params, p=projector: compress(params, p))
        exported = export.export(run)(shapes())
        jax.tree.map(
            np.testing.assert_array_equal, exported.call([kernel]), run([kernel])
        )
    with pytest.raises(ValueError, match="the shapes of what is pruned must be known"):
        export.export(jax.jit(lambda params: compress(params, top_k(0.5))))(shapes())


def outputs_first(path, leaf):
    return cram_jax.Axes("output", "input")
