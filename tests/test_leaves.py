import re

import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax import all_but, compress, matching, prunable, top_k

PARAMS = {"bias": jnp.zeros(3), "layers": [jnp.zeros((2, 2)), jnp.zeros(())]}


def test_by_default_leaves_of_two_or_more_dimensions():
    assert prunable(PARAMS) == [False, True, False]
    assert prunable(jnp.zeros((2, 3, 4))) == [True]


def test_where_sees_the_path_and_the_leaf():
    seen = []

    def where(path, leaf):
        seen.append((path, leaf.shape))
        return re.fullmatch(r"layers/\d", path) is not None

    assert prunable(PARAMS, where) == [False, True, True]
    assert seen == [("bias", (3,)), ("layers/0", (2, 2)), ("layers/1", ())]


def test_where_may_be_a_tree_of_bools():
    assert prunable(PARAMS, {"bias": True, "layers": [False, False]}) == [
        True,
        False,
        False,
    ]


def test_where_may_hold_the_bools_of_numpy_and_jax():
    where = {"bias": np.True_, "layers": [jnp.array(False), np.array(True)]}
    assert prunable(PARAMS, where) == [True, False, True]
    plain = {"bias": True, "layers": [False, True]}
    assert top_k(0.5, where=where) == top_k(0.5, where=plain)


def test_a_where_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"chooses no leaf to prune, .*'layers/0'"):
        prunable(PARAMS, lambda path, leaf: "kernel" in path)


def test_a_tree_of_another_structure_is_refused():
    with pytest.raises(
        ValueError, match="where, if it is not a function, must have the structure"
    ):
        prunable(PARAMS, {"bias": True})


def test_a_tree_of_something_else_is_refused():
    with pytest.raises(
        TypeError, match="where must be a tree of bools, got the leaf 1"
    ):
        prunable(PARAMS, {"bias": 1, "layers": [True, True]})
    for leaf in (np.ones(3, bool), jnp.array(1), np.int8(1)):
        with pytest.raises(TypeError, match="where must be a tree of bools, got the"):
            prunable(PARAMS, {"bias": leaf, "layers": [True, True]})


def test_a_chosen_integer_leaf_is_refused_and_another_is_not_looked_at():
    params = {"steps": jnp.zeros((2, 2), jnp.int32), "kernel": jnp.zeros((2, 2))}
    with pytest.raises(TypeError, match=r"params\['steps'\] has dtype int32, expected"):
        prunable(params)
    assert prunable(params, lambda path, leaf: path == "kernel") == [True, False]


NETWORK = {
    "encoder": [{"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}] * 2,
    "head": {"kernel": jnp.zeros((2, 2))},
    "stem": {"kernel": jnp.zeros((2, 2))},
}


def test_leaves_are_chosen_by_their_path():
    assert prunable(NETWORK, matching("^encoder/")) == [False, True] * 2 + [False] * 2
    assert (
        prunable(NETWORK, all_but("^(stem|head)/")) == [False, True] * 2 + [False] * 2
    )
    assert prunable(NETWORK, matching("1/kernel")) == [False] * 3 + [True] + [False] * 2


def test_patterns_are_found_anywhere_in_the_path():
    kernel = jnp.ones((2, 2))
    params = {"a": {"query": {"kernel": kernel}, "value": {"kernel": kernel}}}
    assert prunable(params, matching("query")) == [True, False]
    assert prunable(params, all_but("query")) == [False, True]


@pytest.mark.parametrize("helper", [matching, all_but])
@pytest.mark.parametrize("pattern", ["(", None])
def test_a_pattern_that_is_no_expression_is_refused(helper, pattern):
    with pytest.raises(ValueError, match="pattern must be a regular expression, got"):
        helper(pattern)


@pytest.mark.parametrize("pattern", ["kernel$", ["a", "b"]])
def test_a_pattern_without_its_helper_is_refused_with_it(pattern):
    with pytest.raises(TypeError, match=r"^where must .* pass matching\(...\) or"):
        top_k(0.5, where=pattern)


def test_a_where_must_answer_without_the_weights():
    params = {"a": jnp.ones((2, 2))}
    two = jnp.array(2)  # not of the weights
    assert prunable(params, lambda path, leaf: leaf.ndim == two) == [True]
    top_k(0.5, where=lambda path, leaf: leaf.ndim == two).init(params)
    with pytest.raises(TypeError, match=r"^where must not read .* of 'a'"):
        compress(params, top_k(0.5, where=lambda path, leaf: leaf.max() > 0))
    with pytest.raises(TypeError, match=r"^where .* shape \(2, 2\) for 'a'"):
        prunable(params, lambda path, leaf: leaf > 0)
