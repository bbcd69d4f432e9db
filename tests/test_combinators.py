import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from watching import Watched

from cram_jax import (
    Projection,
    Projector,
    cached,
    compose,
    compress,
    fake_quant,
    identity,
    matching,
    n_m,
    one_of,
    stateless,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


def assert_trees_equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@dataclasses.dataclass(frozen=True)
class Counting(Projector):
    """Counts its uses."""

    label: str

    def init(self, params):
        return jnp.zeros([], jnp.int32)

    def project(self, params, state, key):
        return identity().project(params, (), None)[0], state + 1


@given(strategies.trees())
def test_identity_changes_nothing(params):
    projection = compress(params, identity())
    assert_trees_equal(projection.params, params)
    assert all(mask.all() for mask in jax.tree.leaves(projection.masks))


MEMBERS = [top_k(0.5), fake_quant(4), compose(top_k(0.7), fake_quant(3))]


@jax.jit
def draw_and_members(params, key):
    drawn = compress(params, one_of(*MEMBERS), key=key)
    return drawn, [compress(params, member) for member in MEMBERS]


@given(strategies.trees(strategies.FEW_LAYOUTS), st.integers(0, 2**31 - 1))
def test_one_of_gives_what_one_member_gives(params, seed):
    drawn, candidates = draw_and_members(params, jax.random.key(seed))
    assert any(
        all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(drawn), jax.tree.leaves(c), strict=True)
        )
        for c in candidates
    )


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [(None, [1 / 3] * 3), ((0.5, 0.0, 0.5), [0.5, 0, 0.5])],
)
def test_one_of_draws_with_the_probabilities_it_was_given(probabilities, expected):
    projector = one_of(*map(Counting, "abc"), probabilities=probabilities)
    params, draws = {"w": jnp.ones(2)}, 3000

    @jax.jit
    def run(state):
        def use(state, key):
            return projector.project(params, state, key)[1], None

        return jax.lax.scan(use, state, jax.random.split(KEY, draws))[0]

    counts = np.array(run(projector.init(params)))
    assert counts.sum() == draws
    # Four standard deviations of a binomial count.
    np.testing.assert_allclose(counts / draws, expected, atol=4 * 0.5 / draws**0.5)


def test_one_of_draws_the_same_for_the_same_key():
    projector = one_of(top_k(0.3), top_k(0.6), top_k(0.9))
    params = {"w": jnp.arange(100.0).reshape(10, 10)}

    @jax.jit
    def count(key):
        return compress(params, projector, key=key).masks["w"].sum()

    kept = [[int(count(k)) for k in jax.random.split(KEY, 8)] for _ in range(2)]
    assert kept[0] == kept[1]
    assert set(kept[0]) <= {70, 40, 10}
    assert len(set(kept[0])) > 1


def test_one_of_without_a_key_is_refused():
    with pytest.raises(ValueError, match=r"one_of\(.*key must be given, got None"):
        compress({"w": jnp.ones((2, 2))}, one_of(top_k(0.5), n_m(1, 2)))


@pytest.mark.parametrize(
    "probabilities",
    [(0.5,), (0.7, 0.7), (1.5, -0.5), (0.2, 0.2, 0.6), (np.nan, np.nan), "ab"],
)
def test_wrong_probabilities_are_refused(probabilities):
    with pytest.raises(ValueError, match=r"probabilities must be 2 numbers >= 0"):
        one_of(top_k(0.5), top_k(0.7), probabilities=probabilities)


@pytest.mark.parametrize("combine", [one_of, compose])
def test_no_projector_or_something_else_is_refused(combine):
    with pytest.raises(ValueError, match="needs at least one projector, got none"):
        combine()
    with pytest.raises(TypeError, match=r"projectors\[1\] of .* must be a Projector"):
        combine(top_k(0.5), 0.7)


@functools.partial(jax.jit, static_argnames="bits")
def together_and_in_turn(params, sparsity, bits):
    together = compress(params, compose(top_k(sparsity), fake_quant(bits)))
    pruned = compress(params, top_k(sparsity))
    return together, pruned.masks, compress(pruned.params, fake_quant(bits)).params


@given(
    strategies.trees(strategies.FEW_LAYOUTS),
    strategies.sparsities(),
    st.sampled_from([2, 4]),
)
def test_compose_prunes_and_then_quantises(params, sparsity, bits):
    projection, masks, values = together_and_in_turn(params, sparsity, bits)
    assert_trees_equal(projection.masks, masks)
    assert_trees_equal(projection.params, values)
    for leaf, mask in zip(*map(jax.tree.leaves, projection), strict=True):
        assert (np.asarray(leaf)[~np.asarray(mask)] == 0).all()


def test_compose_keeps_what_every_member_keeps_and_zeros_stay_zero():
    def shift(params, key):
        """Moves every weight, zeros too."""
        return Projection(*compress(jax.tree.map(lambda p: p + 5, params), identity()))

    params = [jnp.array([[4.0], [1.0], [3.0], [2.0]])]
    projector = compose(top_k(0.25), stateless(shift, "shift"), n_m(1, 2))
    projection = compress(params, projector)
    np.testing.assert_array_equal(projection.masks[0].ravel(), [1, 0, 1, 0])
    np.testing.assert_array_equal(projection.params[0].ravel(), [9, 0, 8, 0])


def test_compose_hands_each_member_its_state_and_a_key_of_its_own():
    keys = []
    member = Watched(Counting("a"), lambda params, key, projection: keys.append(key))
    projector = compose(member, Counting("b"), member)
    params = {"w": jnp.ones(2)}
    _, state = projector.project(params, projector.init(params), KEY)
    assert [int(count) for count in state] == [1, 1, 1]
    assert not (jax.random.key_data(keys[0]) == jax.random.key_data(keys[1])).all()


MAKES = {
    "plain": top_k,
    "where": lambda sparsity: top_k(sparsity, where=matching("a")),
    "tree": lambda sparsity: top_k(sparsity, where={"a": True, "b": False}),
    "scope": lambda sparsity: top_k(sparsity, scope="layer"),
    "block": lambda sparsity: top_k(sparsity, block=(1, 2)),
    "compose": lambda sparsity: compose(top_k(sparsity), fake_quant(4)),
}


@pytest.mark.parametrize("name", MAKES)
def test_one_program_serves_members_that_differ_in_sparsity(name):
    params = {"a": jax.random.normal(jax.random.key(0), (6, 8)), "b": jnp.ones((3, 4))}
    members = [MAKES[name](sparsity) for sparsity in (0.29, 0.5, 1 - 1 / 3)]
    together = one_of(*members)
    # Watched members have nothing in common, so that each gets a program.
    apart = one_of(*(Watched(member, lambda *_: None) for member in members))

    def program(multi):
        project = jax.jit(lambda key: compress(params, multi, key=key))
        equations = project.trace(jax.random.key(0)).jaxpr.eqns
        return project, {equation.primitive.name for equation in equations}

    one, several = program(together), program(apart)
    assert "cond" not in one[1]
    assert "cond" in several[1]
    if name in ("where", "tree"):  # whose values are computed as those of "plain"
        return
    for seed in range(8):
        key = jax.random.key(seed)
        chex.assert_trees_all_equal(one[0](key), several[0](key))


def test_members_alike_share_a_program_beside_others():
    params = {"a": jax.random.normal(KEY, (6, 8))}
    members = [fake_quant(4), top_k(0.25), cached(top_k(0.5), every=2), top_k(0.75)]
    together = one_of(*members)
    apart = one_of(*(Watched(member, lambda *_: None) for member in members))

    @functools.partial(jax.jit, static_argnums=0)
    def run(projector, keys):
        def use(state, key):
            projection, state = projector.project(params, state, key)
            return state, projection

        return jax.lax.scan(use, projector.init(params), keys)[1]

    keys = jax.random.split(KEY, 12)
    chex.assert_trees_all_equal(run(together, keys), run(apart, keys))
    assert len(together._groups()) == 3


@pytest.mark.parametrize(
    "projector", [cached(top_k(0.5), every=2), one_of(top_k(0.5), n_m(1, 2))]
)
def test_nothing_compiles_again_outside_of_jit(projector, caplog):
    params = {"w": jnp.arange(12.0).reshape(4, 3)}

    def project():
        state = projector.init(params)
        for key in jax.random.split(jax.random.key(0), 4):
            projection, state = projector.project(params, state, key)
        return projection, state

    expected = jax.jit(project)()
    project()
    with jax.log_compiles():
        found = project()
    assert not any("Finished XLA compilation" in text for text in caplog.messages)
    assert_trees_equal(found, expected)


def test_top_k_of_other_leaves_is_not_taken_for_the_same():
    params = {"a": jnp.arange(4.0)[None], "b": jnp.arange(4.0)[None]}
    multi = one_of(top_k(0.5, where=matching("a")), top_k(0.5, where=matching("b")))
    masks = jax.jit(lambda key: compress(params, multi, key=key).masks)
    kept = {
        tuple(int(mask.sum()) for mask in masks(jax.random.key(seed)).values())
        for seed in range(8)
    }
    assert kept == {(2, 4), (4, 2)}
