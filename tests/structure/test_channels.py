"""The projector of whole channels."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from structure import models
from structure.comparing import filled

from cram_jax import (
    Projector,
    cached,
    compose,
    compress,
    fake_quant,
    one_of,
    scheduled,
)
from cram_jax.structure import (
    channels,
    group_masks,
    kept_groups,
    producer_norm,
    shrink,
    small_apply,
    small_shapes,
    trace_structure,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTHS = (6, 16, 10, 3)
SHAPES = {
    f"dense{i}": {
        "kernel": jax.ShapeDtypeStruct((a, b), jnp.float32),
        "bias": jax.ShapeDtypeStruct((b,), jnp.float32),
    }
    for i, (a, b) in enumerate(itertools.pairwise(WIDTHS))
}


def apply(params, x):
    for name in sorted(params):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = jax.nn.relu(x) if name != "dense2" else x
    return x


STRUCTURE = trace_structure(apply, SHAPES, jax.ShapeDtypeStruct((4, 6), jnp.float32))
PARAMS = jax.tree.map(lambda x: x.astype(np.float32), filled(SHAPES))


def keep(projector, params=PARAMS):
    masks = jax.jit(lambda p: projector.project(p, (), None)[0].masks)(params)
    return kept_groups(STRUCTURE, masks)


def reference_scores(params):
    """Root mean squares of the columns, over those of the layer, in float64."""
    scores = []
    for name in ("dense0", "dense1"):
        means = np.square(params[name]["kernel"].astype(float)).mean(0)
        scores.append(np.sqrt(means / means.mean()))
    return np.concatenate(scores)


def test_the_score_is_the_norm_of_the_producer_relative_to_its_family():
    np.testing.assert_allclose(
        producer_norm(STRUCTURE, PARAMS), reference_scores(PARAMS), rtol=1e-6
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 23 / 26])
def test_global_scope_keeps_exactly_the_best_k(sparsity):
    kept = keep(channels(sparsity, STRUCTURE))
    count = 26 - int(round(sparsity * 26, 9))
    scores = reference_scores(PARAMS)
    # The best of each family stays, so that no layer is cut through.
    scores[[np.argmax(scores[:16]), 16 + np.argmax(scores[16:])]] = np.inf
    assert set(np.flatnonzero(kept)) == set(np.argsort(-scores)[:count])


def test_family_scope_keeps_a_share_of_every_family():
    kept = keep(channels(0.5, STRUCTURE, scope="family"))
    scores = reference_scores(PARAMS)
    assert set(np.flatnonzero(kept[:16])) == set(np.argsort(-scores[:16])[:8])
    assert set(np.flatnonzero(kept[16:])) == set(np.argsort(-scores[16:])[:5])


def test_masks_zero_every_coupled_entry_and_nothing_else():
    params, masks = compress(PARAMS, channels(0.5, STRUCTURE))
    kept = kept_groups(STRUCTURE, masks)
    first, second = kept[:16], kept[16:]
    expected = {
        "dense0": {"kernel": np.ones((6, 1)) * first, "bias": first},
        "dense1": {"kernel": first[:, None] & second, "bias": second},
        "dense2": {"kernel": second[:, None] * np.ones(3), "bias": np.ones(3)},
    }
    jax.tree.map(np.testing.assert_array_equal, masks, jax.tree.map(bool_, expected))
    jax.tree.map(
        lambda p, m, v: np.testing.assert_array_equal(p, np.where(m, v, 0)),
        params,
        masks,
        PARAMS,
    )


def bool_(array):
    return np.asarray(array, bool)


def test_projecting_twice_changes_nothing():
    projector = channels(0.5, STRUCTURE)
    once = compress(PARAMS, projector)
    twice = compress(once.params, projector)
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_ties_go_to_the_group_that_comes_first():
    ones = jax.tree.map(np.ones_like, PARAMS)
    kept = keep(channels(0.5, STRUCTURE, scope="family"), ones)
    assert list(np.flatnonzero(kept)) == [*range(8), *range(16, 21)]


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_multiple_of_keeps_whole_vectors(sparsity):
    kept = keep(channels(sparsity, STRUCTURE, multiple_of=4))
    first, second = kept[:16].sum(), kept[16:].sum()
    assert first % 4 == 0
    assert second % 4 == 0 or second == 10
    assert first + second <= 26 - int(sparsity * 26)
    # Within a family the best stay.
    scores = reference_scores(PARAMS)
    assert set(np.flatnonzero(kept[:16])) == set(np.argsort(-scores[:16])[:first])


@pytest.mark.parametrize("score", [0.7, 0.1, 1 / 3])
def test_equal_scores_are_kept_in_whole_vectors(score):
    """The mean of a shorter block rounds differently."""
    params = {"a": jnp.full((3, 20), score).at[:, :8].set(3 * score)}
    params["b"] = jnp.ones((20, 2))
    structure = trace_structure(
        lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 3))
    )
    kept = channels(0.4, structure, multiple_of=8).keep(params)
    np.testing.assert_array_equal(np.flatnonzero(kept), range(8))


def test_a_family_below_the_multiple_stays_whole():
    kept = keep(channels(0.5, STRUCTURE, multiple_of=16))
    assert kept.all()
    kept = keep(channels(0.3, STRUCTURE, multiple_of=10))
    assert kept[16:].all()
    kept = keep(channels(0.3, STRUCTURE, multiple_of=5, scope="family"))
    assert kept[16:].sum() == 5
    assert kept[:16].sum() == 10


def test_at_least_stays_in_every_family():
    params = jax.tree.map(np.copy, PARAMS)
    projector = channels(0.6, STRUCTURE, at_least=4, rank=lambda s, p: jnp.arange(26.0))
    kept = keep(projector, params)
    assert kept.sum() == 26 - int(0.6 * 26)
    assert kept[:16].sum() == 4
    assert kept[12:16].all()


@pytest.mark.parametrize("of", ["parameters", "multiply_adds"])
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.8])
def test_budgets_keep_as_many_groups_as_fit(of, sparsity):
    kept = keep(channels(sparsity, STRUCTURE, of=of))
    biases = of == "parameters"

    def cost(kept):
        a, b = int(kept[:16].sum()), int(kept[16:].sum())
        weights = 6 * a + a * b + 3 * b
        return weights + a + b + 3 if biases else 4 * weights

    budget = (1 - sparsity) * cost(np.ones(26, bool))
    assert cost(kept) <= budget * (1 + 1e-6)
    # The next best group would not have fitted.
    scores = np.where(kept, -np.inf, reference_scores(PARAMS))
    more = kept.copy()
    more[np.argmax(scores)] = True
    assert cost(more) > budget


def multiply_adds(program):
    """Of the products of a program, read off their shapes."""
    total = 0
    for eqn in program.eqns:
        shapes = [var.aval.shape for var in (*eqn.invars, *eqn.outvars)]
        if eqn.primitive.name == "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            total += math.prod(shapes[-1]) * math.prod(shapes[0][i] for i in summed)
        elif eqn.primitive.name == "conv_general_dilated":
            outputs = eqn.params["dimension_numbers"].rhs_spec[0]
            total += math.prod(shapes[-1]) * math.prod(shapes[1]) // shapes[1][outputs]
        for parameter in eqn.params.values():
            if hasattr(parameter, "jaxpr"):
                total += multiply_adds(parameter.jaxpr)
    return total


@pytest.mark.parametrize("of", ["parameters", "multiply_adds"])
def test_the_budget_of_a_residual_network_is_that_of_its_smaller_program(of):
    network, variables, *inputs = models.resnet_nnx()
    structure = trace_structure(network, variables, *inputs)
    values = jax.tree.map(lambda x: x.astype(np.float32), filled(variables))
    kept = np.asarray(jax.jit(channels(0.5, structure, of=of).keep)(values))

    def cost(kept):
        shapes = small_shapes(structure, kept)
        if of == "parameters":
            return sum(map(math.prod, shapes.values()))
        small = jax.eval_shape(lambda v: shrink(structure, v, kept), variables)
        program = jax.make_jaxpr(small_apply(structure, kept))(small, *inputs)
        return multiply_adds(program.jaxpr)

    budget = cost(np.ones(structure.size, bool)) / 2
    assert cost(kept) <= budget
    scores = np.where(kept, -np.inf, producer_norm(structure, values))
    more = kept.copy()
    more[np.argmax(scores)] = True
    assert cost(more) > budget


def test_where_takes_names_patterns_and_functions():
    names = [["dense1/kernel[1]"], "^dense1/bias", lambda f: f.size == 10]
    for where in names:
        kept = keep(channels(0.5, STRUCTURE, where=where))
        assert kept[:16].all()
        assert kept[16:].sum() == 5


def test_it_is_a_value_and_prints_as_it_was_made():
    projector = channels(0.5, STRUCTURE, where=["dense0/bias[0]"], multiple_of=2)
    assert isinstance(projector, Projector)
    assert projector == channels(
        0.5, STRUCTURE, where=("dense0/bias[0]",), multiple_of=2
    )
    assert hash(projector) == hash(
        channels(0.5, STRUCTURE, where=["dense0/bias[0]"], multiple_of=2)
    )
    assert projector != channels(0.6, STRUCTURE)
    assert repr(projector) == (
        "channels(0.5, structure, where=('dense0/bias[0]',), multiple_of=2)"
    )


def test_it_works_inside_the_other_projectors_and_under_jit():
    members = [channels(s, STRUCTURE) for s in (0.25, 0.5)]
    projector = compose(cached(one_of(*members), every=2), fake_quant(4))

    @jax.jit
    def use(params, state, key):
        return projector.project(params, state, key)

    state = projector.init(PARAMS)
    (params, masks), _ = use(PARAMS, state, jax.random.key(0))
    kept = kept_groups(STRUCTURE, masks)
    assert kept.sum() in (26 - int(s * 26) for s in (0.25, 0.5))
    expected = group_masks(STRUCTURE, kept)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)
    assert params["dense0"]["kernel"].dtype == jnp.float32


def test_many_sparsities_share_one_program_and_one_may_follow_a_schedule():
    drawn = one_of(*(channels(s, STRUCTURE) for s in (0.25, 0.5, 0.75)))

    def draw(key):
        return drawn.project(PARAMS, drawn.init(PARAMS), key)

    program = str(jax.make_jaxpr(draw)(jax.random.key(0)))
    assert " cond[" not in program
    gradual = scheduled(
        lambda share: channels(share, STRUCTURE), optax.linear_schedule(0.0, 0.98, 3)
    )
    project = jax.jit(lambda state: gradual.project(PARAMS, state, None))
    state = gradual.init(PARAMS)
    counts = []
    for _ in range(4):
        (_, masks), state = project(state)
        counts.append(int(kept_groups(STRUCTURE, masks).sum()))
    # At least one group of each of two families stays.
    assert counts == [26, 26 - int(26 * 0.98 / 3), 26 - int(26 * 1.96 / 3), 2]


def test_a_part_of_the_variables_is_projected():
    def with_statistics(variables, x):
        params, stats = variables["params"], variables["stats"]
        x = (x @ params["a"] - stats) * params["scale"]
        return jax.nn.relu(x) @ params["b"]

    shapes = {"a": (3, 8), "b": (8, 2), "scale": (8,)}
    params = filled(
        {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    )
    whole = trace_structure(
        with_statistics, {"params": params, "stats": np.ones(8)}, np.ones((1, 3))
    )
    part = whole.part(lambda variables: variables["params"])
    masks = compress(params, channels(0.5, part)).masks
    assert masks["scale"].sum() == 4
    kept = kept_groups(part, masks)
    np.testing.assert_array_equal(group_masks(whole, kept)["stats"], masks["scale"])


@pytest.mark.several_devices
def test_sharded_parameters_give_the_same_masks():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "x")
    shard = jax.sharding.NamedSharding(mesh, spec)
    params = jax.tree.map(jnp.asarray, PARAMS)
    params["dense0"]["kernel"] = jax.device_put(params["dense0"]["kernel"], shard)
    projector = channels(0.5, STRUCTURE)
    got = jax.jit(lambda p: projector.project(p, (), None)[0].masks)(params)
    jax.tree.map(np.testing.assert_array_equal, got, compress(PARAMS, projector).masks)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be at least 0 and below 1"),
        ({"sparsity": "half"}, TypeError, "sparsity must be a number .* got 'half'"),
        ({"structure": 3}, TypeError, "structure must be a Structure, got 3"),
        ({"scope": "layer"}, ValueError, "scope must be 'global' or 'family'"),
        ({"of": "bytes"}, ValueError, "of must be 'groups', 'parameters' or"),
        ({"of": "parameters", "scope": "family"}, ValueError, "of must be 'groups' if"),
        ({"multiple_of": 0}, ValueError, "multiple_of must be at least 1, got 0"),
        ({"at_least": 1.5}, TypeError, "at_least must be an integer, got 1.5"),
        ({"at_least": 10}, ValueError, "leaves 13 of 26 groups, but at_least=10"),
        ({"sparsity": 0.99, "of": "parameters"}, ValueError, "is out of reach"),
        (
            {"where": ["dense0/kernel[0]"]},
            ValueError,
            r"where names 'dense0/kernel\[0\]', which is frozen: a model input",
        ),
        ({"where": ["dense0"]}, ValueError, "where names 'dense0', which is no axis"),
        ({"where": "bias.2"}, ValueError, "chooses none of 2 families"),
        (
            {"where": "dense2/bias"},
            ValueError,
            r"frozen axes only: dense2/bias\[0\]: a model output",
        ),
        (
            {"where": "dense0/kernel[1]"},
            ValueError,
            r"regular expression.*use where=\['dense0/kernel\[1\]'\]",
        ),
        ({"where": "("}, ValueError, "where must be a regular expression"),
        ({"where": lambda f: False}, ValueError, "chooses none of 2 families"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    arguments = {"sparsity": 0.5, "structure": STRUCTURE, **arguments}
    with pytest.raises(error, match=message):
        channels(arguments.pop("sparsity"), arguments.pop("structure"), **arguments)


def test_a_structure_without_channels_says_why():
    structure = trace_structure(lambda p, x: x @ p, np.ones((3, 4)), np.ones((1, 3)))
    reasons = "all are frozen: a model input; a model output"
    with pytest.raises(ValueError, match=reasons):
        channels(0.5, structure)


def test_parameters_and_ranks_of_another_shape_are_refused_at_init():
    with pytest.raises(ValueError, match=r"params must have the 6 leaves"):
        channels(0.5, STRUCTURE).init({"dense0": PARAMS["dense0"]})
    wide = {**PARAMS, "dense0": {"kernel": np.ones((6, 17)), "bias": np.ones(16)}}
    with pytest.raises(ValueError, match=r"params\['dense0/kernel'\] must have the s"):
        channels(0.5, STRUCTURE).init(wide)
    with pytest.raises(ValueError, match="one score for each of 26 groups"):
        channels(0.5, STRUCTURE, rank=lambda s, p: jnp.ones(3)).init(PARAMS)
