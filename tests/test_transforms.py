import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from watching import Watched

import cram_jax
from cram_jax import (
    compressed_sam,
    cram,
    cram_plus,
    fake_quant,
    identity,
    n_m,
    one_of,
    sam,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROJECTORS = {
    "identity": identity(),
    "top_k": top_k(0.5),
    "layer": top_k(0.7, scope="layer"),
    "n_m": n_m(2, 4),
    "fake_quant": fake_quant(4),
    "compose": cram_jax.compose(top_k(0.5), fake_quant(4)),
    "one_of": one_of(
        top_k(0.3), n_m(2, 4), fake_quant(3), probabilities=(0.2, 0.3, 0.5)
    ),
}
TRANSFORMATIONS = {
    "cram": cram,
    "cram_plus": cram_plus,
    "compressed_sam": compressed_sam,
    "cram_dense_gradients": functools.partial(cram, sparse_gradients=False),
    "cram_normalized": functools.partial(cram_plus, normalize=True),
    "sam": lambda loss_fn, projector, rho=0.05, **options: sam(loss_fn, rho, **options),
}


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (4, 8)), "bias": jnp.ones(8)},
        "last": {"kernel": jax.random.normal(keys[1], (8, 2)), "bias": jnp.zeros(2)},
    }


def make_batch(seed=0, size=8):
    x, y = jax.random.split(jax.random.key(100 + seed))
    return jax.random.normal(x, (size, 4)), jax.random.normal(y, (size, 2))


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    output = hidden @ params["last"]["kernel"] + params["last"]["bias"]
    return jnp.mean((output - y) ** 2)


def run(transformation, steps=3, **extra_args):
    """Plain descent along what the transformation gives."""
    params = make_params()
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for step in range(steps):
        batch = make_batch(step)
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = update(grads, state, params, batch=batch, **extra_args)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
    return params, state


def assert_close(ours, expected):
    # float32 sums in another order, over values of about 1.
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=2e-6)


def pairs():
    """Every projector in two rules, every rule with `one_of`; by night all."""
    for make, projector in itertools.product(TRANSFORMATIONS, PROJECTORS):
        is_usual = make in ("cram_plus", "compressed_sam") or projector == "one_of"
        marks = [] if is_usual else [pytest.mark.nightly]
        yield pytest.param(
            TRANSFORMATIONS[make],
            PROJECTORS[projector],
            marks=marks,
            id=f"{make}-{projector}",
        )


@pytest.mark.parametrize(("make", "projector"), [*pairs()])
def test_every_pair_obeys_the_contract_of_optax(make, projector):
    params, batch = make_params(), make_batch()
    transformation = make(loss_fn, projector, 0.1)
    state = transformation.init(params)
    grads = jax.grad(loss_fn)(params, batch)
    traces = 0

    @jax.jit
    def update(grads, state, params, batch):
        nonlocal traces
        traces += 1
        # `value` belongs to a neighbour in the chain: it must pass.
        return transformation.update(grads, state, params, batch=batch, value=1.0)

    updates, new_state = update(grads, state, params, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_tree_all_finite(updates)
    update(updates, new_state, params, batch)
    assert traces == 1
    assert int(new_state.count) == 1
    assert np.isfinite(new_state.compressed_loss)


def test_cram_plus_is_the_dense_gradient_plus_cram():
    params, batch = make_params(), make_batch()
    grads = jax.grad(loss_fn)(params, batch)
    projector = PROJECTORS["one_of"]
    for options in ({}, {"normalize": True, "sparse_gradients": False}):
        one, plus = (
            make(loss_fn, projector, 0.1, key=7, **options)
            for make in (cram, cram_plus)
        )
        inner, state = jax.jit(one.update)(grads, one.init(params), params, batch=batch)
        both, plus_state = jax.jit(plus.update)(
            grads, plus.init(params), params, batch=batch
        )
        chex.assert_trees_all_equal(both, jax.tree.map(jnp.add, grads, inner))
        chex.assert_trees_all_equal(state.compressed_loss, plus_state.compressed_loss)


@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_a_loss_that_arrives_at_update_gives_the_same(make):
    params, batch = make_params(), make_batch()
    grads = jax.grad(loss_fn)(params, batch)

    def closure(params):
        return loss_fn(params, batch), "dropped"

    known, arriving = (
        make(loss, top_k(0.5), 0.1, has_aux=loss is None) for loss in (loss_fn, None)
    )
    state = known.init(params)
    expected = known.update(grads, state, params, batch=batch)
    ours = arriving.update(grads, state, params, value_fn=closure)
    chex.assert_trees_all_equal(ours, expected)


def test_a_loss_that_arrives_takes_arguments_by_name_too():
    params, batch = make_params(), make_batch()
    grads = jax.grad(loss_fn)(params, batch)
    known, arriving = (cram_plus(loss, top_k(0.5)) for loss in (loss_fn, None))
    state = known.init(params)
    expected = known.update(grads, state, params, batch=batch)
    ours = arriving.update(
        grads, state, params=params, value_fn=loss_fn, batch=batch, value=1.0
    )
    chex.assert_trees_all_equal(ours, expected)


def test_arguments_of_the_loss_may_be_called_state_and_updates():
    def loss(params, state, updates):
        return loss_fn(params, (state, updates))

    params, (x, y) = make_params(), make_batch()
    grads = jax.grad(loss)(params, x, y)
    for make in (cram, cram_plus, compressed_sam):
        rule, expected = make(loss, top_k(0.5)), make(loss_fn, top_k(0.5))
        state = rule.init(params)
        chex.assert_trees_all_equal(
            rule.update(grads, state, params, state=x, updates=y),
            expected.update(grads, state, params, batch=(x, y)),
        )


def test_sam_is_cram_with_the_identity_and_a_normalised_gradient():
    expected = run(cram(loss_fn, identity(), 0.1, normalize=True))[0]
    chex.assert_trees_all_equal(run(sam(loss_fn, 0.1))[0], expected)


def test_sam_agrees_with_optax():
    params, batch = make_params(), make_batch()
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = optax.contrib.sam(optax.sgd(0.1), adversary, opaque_mode=True)
    grads = jax.grad(loss_fn)(params, batch)
    expected, _ = theirs.update(
        grads,
        theirs.init(params),
        params,
        grad_fn=lambda params, _: jax.grad(loss_fn)(params, batch),
    )
    ours = optax.chain(sam(loss_fn, 0.1), optax.sgd(0.1))
    updates, _ = ours.update(grads, ours.init(params), params, batch=batch)
    assert_close(updates, expected)


def test_rho_zero_is_the_gradient_of_the_compressed_model():
    params, batch = make_params(), make_batch()
    (pruned, masks) = cram_jax.compress(params, top_k(0.5))
    transformation = cram(loss_fn, top_k(0.5), rho=0)
    grads = jax.grad(loss_fn)(params, batch)
    updates, state = transformation.update(
        grads, transformation.init(params), params, batch=batch
    )
    inner = jax.grad(loss_fn)(pruned, batch)
    assert_close(updates, jax.tree.map(lambda m, g: jnp.where(m, g, 0), masks, inner))
    assert_close(state.compressed_loss, loss_fn(pruned, batch))


@pytest.mark.parametrize("rho", [0, 0.0, np.float32(0)])
def test_rho_zero_does_not_read_the_updates(rho):
    params, batch = make_params(), make_batch()
    rule = cram(loss_fn, top_k(0.5), rho)
    state = rule.init(params)
    nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    ours, _ = rule.update(nothing, state, params, batch=batch)
    other, _ = rule.update(None, state, params, batch=batch)
    chex.assert_trees_all_equal(ours, other)
    chex.assert_tree_all_finite(ours)
    for options in ({"rho": jnp.zeros([])}, {"rho": 0.0, "normalize": True}):
        reads = cram(loss_fn, top_k(0.5), **options)
        updates, _ = reads.update(nothing, state, params, batch=batch)
        assert jnp.isnan(updates["last"]["bias"]).all()


def test_the_ascent_moves_leaves_that_the_projector_leaves_alone():
    params, batch = make_params(), make_batch()
    grads = jax.grad(loss_fn)(params, batch)
    seen = []

    watched = Watched(identity(), lambda tree, key, projection: seen.append(tree))
    transformation = cram(loss_fn, watched, rho=0.5)
    transformation.update(grads, transformation.init(params), params, batch=batch)
    assert_close(seen[-1], jax.tree.map(lambda p, g: p + 0.5 * g, params, grads))


def test_rho_follows_a_schedule_of_the_step_count():
    radii = [0.5, 0.0, 0.2]
    scheduled = run(
        cram_plus(loss_fn, top_k(0.5), lambda count: jnp.array(radii)[count])
    )
    params = make_params()
    for step, rho in enumerate(radii):
        batch = make_batch(step)
        constant = cram_plus(loss_fn, top_k(0.5), rho)
        updates, _ = constant.update(
            jax.grad(loss_fn)(params, batch), constant.init(params), params, batch=batch
        )
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
    assert_close(scheduled[0], params)
    assert int(scheduled[1].count) == 3


@pytest.mark.parametrize("rho", [0.05, 3.0])
def test_a_normalised_ascent_has_length_rho(rho):
    params = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
    seen = []

    watched = Watched(identity(), lambda tree, key, projection: seen.append(tree["w"]))
    transformation = cram(
        lambda params: jnp.sum(params["w"] ** 2),
        watched,
        rho,
        normalize=True,
    )
    transformation.update(params, transformation.init(params), params)
    np.testing.assert_allclose(seen[-1] - params["w"], rho * params["w"] / 5, atol=1e-6)


@pytest.mark.parametrize("make", [cram, cram_plus])
def test_a_zero_gradient_gives_no_ascent_under_normalize(make):
    params = {"w": jnp.full((2, 2), 3.0)}
    rule = make(
        lambda params: jnp.sum(params["w"] ** 2), identity(), 0.1, normalize=True
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = rule.update(zeros, rule.init(params), params)
    chex.assert_trees_all_equal(updates, {"w": jnp.full((2, 2), 6.0)})
    assert state.compressed_loss == 36


def test_a_norm_is_taken_in_float32_for_narrow_types():
    params = {"w": jnp.full((64, 64), 300.0, jnp.float16)}  # 300**2 is inf in float16
    rule = sam(lambda params: jnp.mean(params["w"].astype(jnp.float32)), 64.0)
    updates, state = rule.update(params, rule.init(params), params)
    assert updates["w"].dtype == jnp.float16
    # The norm is 64 * 300, so each of them climbs by 1.
    np.testing.assert_allclose(state.compressed_loss, 301)


def test_the_auxiliary_output_of_the_compressed_pass_is_dropped():
    def with_aux(params, batch):
        return loss_fn(params, batch), {"batch_stats": jnp.ones(3)}

    expected = run(cram_plus(loss_fn, top_k(0.5)))
    ours = run(cram_plus(with_aux, top_k(0.5), has_aux=True))
    chex.assert_trees_all_equal(ours[0], expected[0])


def test_the_loss_gets_its_arguments_by_name_and_the_rest_of_the_chain_too():
    def scaled_loss(params, batch, *, weight, offset=1.0):
        return weight * loss_fn(params, batch) + offset

    def neighbour():
        def update(updates, state, params=None, *, weight, value, **extra_args):
            del params
            updates = jax.tree.map(lambda u: u * (value - 2), updates)
            return jax.tree.map(lambda u: u / weight, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    chain = optax.chain(cram(scaled_loss, top_k(0.5)), neighbour())
    ours, _ = run(chain, weight=4.0, value=3.0)
    assert_close(ours, run(cram(loss_fn, top_k(0.5)))[0])


def test_a_loss_that_takes_any_argument_gets_them_all():
    got = {}

    def greedy(params, **arguments):
        got.update(arguments)
        return loss_fn(params, arguments["batch"])

    run(cram(greedy, top_k(0.5)), steps=1, value=2.0)
    assert set(got) == {"batch", "value"}


def test_the_same_seed_draws_the_same():
    projector = one_of(*(top_k(s) for s in (0.2, 0.5, 0.8)))
    seeds = [0, np.int32(0), jax.random.key(0), jax.random.PRNGKey(0), 1]
    runs = [run(cram_plus(loss_fn, projector, key=seed), steps=5) for seed in seeds]
    for other in runs[1:4]:
        chex.assert_trees_all_equal(runs[0], other)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(runs[0][0], runs[4][0])


def test_the_draws_are_those_of_the_key_that_is_split_at_every_step():
    seen, params = [], {"w": jnp.ones(2)}
    watched = Watched(identity(), lambda params, key, projection: seen.append(key))
    for key in (jax.random.key(3), jax.random.key(3, impl="rbg")):
        rule = cram(lambda params: jnp.sum(params["w"]), watched, key=key)
        state = rule.init(params)
        assert state.key.dtype == jnp.uint32
        for _ in range(3):
            _, state = rule.update(params, state, params)
            key, draw = jax.random.split(key)
            assert jnp.array_equal(seen[-1], draw)


def test_a_key_survives_a_step_that_donates_its_state():
    transformation = cram(loss_fn, PROJECTORS["one_of"], key=jax.random.key(3))
    params, batch = make_params(), make_batch()
    update = jax.jit(transformation.update, donate_argnums=1)
    for _ in range(2):
        grads = jax.grad(loss_fn)(params, batch)
        update(grads, transformation.init(params), params, batch=batch)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_keep_their_dtype_beside_float32_scalars(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), make_params())
    transformation = cram_plus(loss_fn, top_k(0.5), lambda count: jnp.float32(0.1))
    grads = jax.grad(loss_fn)(params, make_batch())
    updates, state = transformation.update(
        grads, transformation.init(params), params, batch=make_batch()
    )
    chex.assert_trees_all_equal_dtypes(updates, params)
    assert state.compressed_loss.dtype == jnp.float32


@pytest.mark.several_devices
@pytest.mark.parametrize(
    ("make", "check_vma", "has_aux"),
    [
        (cram, True, True),
        (cram, False, False),
        (cram_plus, True, False),
        (cram_plus, False, True),
    ],
)
def test_shard_map_averages_over_the_axis(make, check_vma, has_aux):
    def loss(params, batch):
        value = loss_fn(params, batch)
        return (value, batch[0]) if has_aux else value

    params, batch = make_params(), make_batch(size=16)
    grads = jax.grad(loss_fn)(params, batch)
    expected = run_once(
        make(loss, top_k(0.5), 0.1, has_aux=has_aux), grads, params, batch
    )
    transformation = make(loss, top_k(0.5), 0.1, has_aux=has_aux, axis_name="data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    def step(grads, params, batch):
        return run_once(transformation, grads, params, batch)

    assert_close(step(grads, params, batch), expected)


@pytest.mark.several_devices
def test_pmap_averages_over_the_axis():
    params, batch = make_params(), make_batch(size=16)
    grads = jax.grad(loss_fn)(params, batch)
    expected = run_once(cram_plus(loss_fn, top_k(0.5), 0.1), grads, params, batch)
    transformation = cram_plus(loss_fn, top_k(0.5), 0.1, axis_name="data")
    step = jax.pmap(
        functools.partial(run_once, transformation),
        axis_name="data",
        in_axes=(None, None, 0),
    )
    shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    outcome = step(grads, params, shards)
    for device in range(8):
        ours = jax.tree.map(lambda x, d=device: x[d], outcome)
        assert_close(ours, expected)


@pytest.mark.parametrize("make", [cram, cram_plus, compressed_sam])
def test_a_forgotten_axis_name_is_an_error_where_jax_knows_what_varies(make):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, same = PartitionSpec("data"), PartitionSpec()

    def trace(loss, params_spec, **options):
        rule = make(loss, identity(), 0.1, **options)
        step = jax.shard_map(
            lambda params, batch: run_once(rule, params, params, batch)[0],
            mesh=mesh,
            in_specs=(params_spec, spread),
            out_specs=params_spec,
        )
        return jax.eval_shape(step, jnp.ones((4, 2)), jnp.ones((4, 2)))

    def loss(params, batch):
        return jnp.mean(params * batch)

    def averaged(params, batch):
        return jax.lax.pmean(loss(params, batch), "data")

    with pytest.raises(ValueError, match="axis_name must name .* got None: .* 'data'"):
        trace(loss, same)
    trace(loss, same, axis_name="data")
    trace(averaged, same)
    # Every device trains a model of its own: there is nothing to average.
    trace(loss, spread)


def run_once(transformation, grads, params, batch):
    updates, state = transformation.update(
        grads, transformation.init(params), params, batch=batch
    )
    return updates, state.compressed_loss


def test_compressed_sam_follows_equation_11():
    """By hand, in float64."""
    with jax.enable_x64(True):
        params, batch, rho = make_params(), make_batch(), 0.3
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        compressed, masks = cram_jax.compress(params, top_k(0.5))
        ascent = jax.tree.map(
            lambda m, g: np.where(m, g, 0), masks, jax.grad(loss_fn)(compressed, batch)
        )
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(ascent)))
        perturbed = jax.tree.map(lambda p, a: p + rho * a / norm, params, ascent)
        compressed, masks = cram_jax.compress(perturbed, top_k(0.5))
        loss, inner = jax.value_and_grad(loss_fn)(compressed, batch)
        expected = jax.tree.map(lambda m, g: np.where(m, g, 0), masks, inner)

        rule = compressed_sam(loss_fn, top_k(0.5), rho)
        nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
        updates, state = rule.update(nothing, rule.init(params), params, batch=batch)
        chex.assert_trees_all_close(updates, expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(state.compressed_loss, loss, rtol=1e-10)


def test_compressed_sam_draws_alike_in_both_projections():
    drawn = []

    def listener(params, key, projection):
        drawn.append(jax.random.key_data(key))

    params, batch = make_params(), make_batch()
    rule = compressed_sam(loss_fn, Watched(identity(), listener))
    rule.update(params, rule.init(params), params, batch=batch)
    np.testing.assert_array_equal(*drawn)


def test_the_program_serves_batches_of_any_size():
    params, loss = make_params(), cram_jax.subsampled(loss_fn, "batch", every=2)
    rule = cram_plus(loss, top_k(0.5))
    state = rule.init(params)

    @jax.jit
    def update(params, x, y):
        grads = jax.grad(loss_fn)(params, (x, y))
        return rule.update(grads, state, params, batch=(x, y))[0]

    def abstract(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)

    (size,) = jax.export.symbolic_shape("n")
    batch = [jax.ShapeDtypeStruct((size, width), jnp.float32) for width in (4, 2)]
    exported = jax.export.export(update)(abstract(params), *batch)
    for size in (6, 7):
        batch = make_batch(size=size)
        assert_close(exported.call(params, *batch), update(params, *batch))


def test_a_step_without_infinities_passes_the_check_for_them():
    params, batch = make_params(), make_batch()
    grads = jax.grad(loss_fn)(params, batch)
    rule = cram_plus(loss_fn, top_k(0.5))
    with jax.debug_infs(True), jax.debug_nans(True):
        state = rule.init(params)
        rule.update(grads, state, params, batch=batch)
    assert state.compressed_loss == jnp.finfo(jnp.float32).max


@pytest.mark.parametrize("projector", PROJECTORS.values(), ids=PROJECTORS)
@pytest.mark.parametrize("make", [cram_plus, compressed_sam])
def test_optax_maps_over_the_state(make, projector):
    """As one does to shard the state like the parameters."""
    params = make_params()
    rule = optax.chain(make(loss_fn, projector), optax.sgd(0.1, momentum=0.9))
    state = rule.init(params)
    mapped = optax.tree.map_params(
        rule, lambda leaf: leaf + 1, state, transform_non_params=lambda leaf: leaf
    )
    trace = optax.tree.get(mapped, "trace")
    chex.assert_trees_all_equal(trace, jax.tree.map(jnp.ones_like, params))
    chex.assert_trees_all_equal(mapped[0], state[0])
