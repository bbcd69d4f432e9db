"""Cutting channels out of trees, and masks that cannot be cut."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cram_jax.structure import (
    group_masks,
    kept_groups,
    shrink,
    small_apply,
    small_shapes,
    trace_structure,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

PARAMS = {
    "a": np.arange(24.0).reshape(3, 8),
    "b": np.arange(8.0),
    "c": np.arange(16.0).reshape(8, 2),
}


def apply(params, x):
    return jax.nn.relu(x @ params["a"] + params["b"]) @ params["c"]


STRUCTURE = trace_structure(apply, PARAMS, np.ones((1, 3)))
KEPT = np.array([True, False, True, True, False, False, True, False])


def test_arrays_keep_the_positions_that_stay():
    small = shrink(STRUCTURE, PARAMS, KEPT)
    np.testing.assert_array_equal(small["a"], PARAMS["a"][:, KEPT])
    np.testing.assert_array_equal(small["b"], PARAMS["b"][KEPT])
    np.testing.assert_array_equal(small["c"], PARAMS["c"][KEPT])
    assert small_shapes(STRUCTURE, KEPT) == {"a": (3, 4), "b": (4,), "c": (4, 2)}


def test_masks_say_the_same_as_groups():
    masks = group_masks(STRUCTURE, KEPT)
    np.testing.assert_array_equal(kept_groups(STRUCTURE, masks), KEPT)
    by_masks = shrink(STRUCTURE, PARAMS, masks)
    by_groups = shrink(STRUCTURE, PARAMS, KEPT)
    jax.tree.map(np.testing.assert_array_equal, by_masks, by_groups)


def test_groups_may_be_a_list():
    for kept in (KEPT.tolist(), tuple(KEPT), [KEPT.tolist()]):
        small = shrink(STRUCTURE, PARAMS, kept)
        np.testing.assert_array_equal(small["b"], PARAMS["b"][KEPT])
    masks = group_masks(STRUCTURE, KEPT.tolist())
    np.testing.assert_array_equal(masks["b"], KEPT)
    with pytest.raises(
        ValueError, match=r"one bool for each of 8 groups, got .*\(3,\)"
    ):
        shrink(STRUCTURE, PARAMS, [True, False, True])


def test_the_state_of_part_of_the_parameters_shrinks_too():
    chosen = dict.fromkeys(PARAMS, False) | {next(iter(PARAMS)): True}
    optimizer = optax.chain(
        optax.trace(0.9), optax.masked(optax.scale_by_adam(), chosen)
    )
    small = shrink(STRUCTURE, PARAMS, KEPT)
    ours = shrink(STRUCTURE, optimizer.init(PARAMS), KEPT)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, optimizer.init(small))
    alone = optax.masked(optax.scale_by_adam(), chosen)
    ours = shrink(STRUCTURE, alone.init(PARAMS), KEPT)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, alone.init(small))


def test_the_state_of_an_optimiser_shrinks_and_goes_on():
    optimizer = optax.adam(0.1)
    state = optimizer.init(PARAMS)
    gradient = jax.tree.map(np.ones_like, PARAMS)
    _, state = optimizer.update(gradient, state, PARAMS)
    small_state = shrink(STRUCTURE, state, KEPT)
    small = shrink(STRUCTURE, PARAMS, KEPT)
    got, _ = optimizer.update(shrink(STRUCTURE, gradient, KEPT), small_state, small)
    whole, _ = optimizer.update(gradient, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, got, shrink(STRUCTURE, whole, KEPT))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            optax.sm3(0.1),
            r"mu/a/0'\] must have the shape \(3, 8\) of the parameter 'a'",
        ),
        (optax.adafactor(0.1), r"v_row/a'\] must have the shape \(3, 8\).*got \(1,\)"),
        (
            optax.adafactor(0.1, min_dim_size_to_factor=1),
            r"v_row/a'\] must have the shape \(3, 8\).*got \(3,\)",
        ),
        (
            optax.lbfgs(memory_size=2),
            r"diff_params_memory/a'\] must have the shape \(3, 8\).*got \(2, 3, 8\)",
        ),
    ],
    ids=["sm3", "adafactor", "adafactor, factored", "lbfgs"],
)
def test_states_of_other_shapes_are_refused(optimizer, message):
    with pytest.raises(ValueError, match=message):
        shrink(STRUCTURE, optimizer.init(jax.tree.map(jnp.asarray, PARAMS)), KEPT)


def test_parameters_among_others_are_refused():
    with pytest.raises(ValueError, match=r"variables\['x/a'\].*of such arrays only"):
        shrink(STRUCTURE, {"like": PARAMS, "x": PARAMS | {"d": np.ones(4)}}, KEPT)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.novograd(0.1),
        optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(1.0, 0.9)),
        optax.partition(
            {"x": optax.adam(0.1), "y": optax.sgd(1.0, 0.9)},
            {"a": "x", "b": "y", "c": "x"},
        ),
    ],
    ids=["MultiSteps", "novograd", "noise", "partition"],
)
def test_scalars_and_keys_of_a_state_stay(optimizer):
    params = jax.tree.map(jnp.asarray, PARAMS)
    ours = shrink(STRUCTURE, optimizer.init(params), KEPT)
    small = shrink(STRUCTURE, params, KEPT)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, optimizer.init(small))


def test_the_state_of_a_list_and_of_one_array_shrinks():
    def of_list(params, x):
        return jax.nn.relu(x @ params[0]) @ params[1]

    def of_one(kernel, x):
        return (jax.nn.relu(x @ kernel) ** 2).sum()

    pair = [jnp.asarray(PARAMS["a"]), jnp.asarray(PARAMS["c"])]
    optimizer = optax.adam(0.1)
    for apply, params in ((of_list, pair), (of_one, pair[0])):
        structure = trace_structure(apply, params, np.ones((1, 3)))
        ours = shrink(structure, optimizer.init(params), KEPT)
        small = shrink(structure, params, KEPT)
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, optimizer.init(small))


def test_shapes_are_enough():
    small = jax.eval_shape(lambda params: shrink(STRUCTURE, params, KEPT), PARAMS)
    assert small["a"].shape == (3, 4)


def test_masks_that_are_no_unions_of_groups_are_refused():
    masks = group_masks(STRUCTURE, KEPT)
    masks["a"][0, 0] = False
    with pytest.raises(ValueError, match=r"whole groups.*masks\['a'\] is False at \(0"):
        kept_groups(STRUCTURE, masks)


def test_removing_a_whole_family_is_refused():
    with pytest.raises(ValueError, match=r"removes all 8 groups of family 0 \(a\[1\]"):
        shrink(STRUCTURE, PARAMS, np.zeros(8, bool))


def test_traced_groups_and_masks_are_refused():
    with pytest.raises(TypeError, match="kept must be concrete"):
        jax.jit(lambda kept: shrink(STRUCTURE, PARAMS, kept))(KEPT)
    with pytest.raises(TypeError, match="masks must be concrete"):
        jax.jit(lambda masks: shrink(STRUCTURE, PARAMS, masks))(
            group_masks(STRUCTURE, KEPT)
        )


def test_other_groups_shapes_and_trees_are_refused():
    with pytest.raises(ValueError, match="one bool for each of 8 groups, got shape"):
        shrink(STRUCTURE, PARAMS, KEPT[1:])
    with pytest.raises(TypeError, match="kept must be bool, got int64"):
        shrink(STRUCTURE, PARAMS, KEPT.astype(np.int64))
    with pytest.raises(
        ValueError, match=r"variables\['b'\] must have the shape \(8,\)"
    ):
        shrink(STRUCTURE, {**PARAMS, "b": np.ones(9)}, KEPT)
    with pytest.raises(ValueError, match="must have the 3 leaves that were traced"):
        shrink(STRUCTURE, {"a": PARAMS["a"]}, KEPT)


def test_a_part_shrinks_but_does_not_run():
    part = STRUCTURE.part(lambda params: {"b": params["b"]})
    assert shrink(part, {"b": PARAMS["b"]}, KEPT)["b"].shape == (4,)
    with pytest.raises(ValueError, match="structure must be that of all variables"):
        small_apply(part, KEPT)
    with pytest.raises(ValueError, match="select must pick a subtree"):
        STRUCTURE.part(lambda params: {"b": jnp.ones(3)})
