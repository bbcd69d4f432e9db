"""The transformations as parts of a chain: arguments, keys, dtypes, state."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problem import (
    PROJECTORS,
    TRANSFORMATIONS,
    assert_close,
    loss_fn,
    make_batch,
    make_params,
    run,
)
from watching import Watched

import cram_jax
from cram_jax import (
    compressed_sam,
    cram,
    cram_plus,
    identity,
    one_of,
    pulled,
    sam,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


def test_a_wrapper_that_passes_everything_on_is_a_loss():
    def wrapper(params, *args, **arguments):
        return loss_fn(params, *args, **arguments)

    expected, _ = run(cram(loss_fn, top_k(0.5)), steps=1)
    for loss in (wrapper, jax.jit(wrapper), functools.partial(wrapper)):
        assert_close(run(cram(loss, top_k(0.5)), steps=1)[0], expected)


@pytest.mark.parametrize("value", [0.0, np.float32(0)])
def test_a_loss_that_is_switched_off_is_a_number(value):
    params = make_params()
    rule = cram_plus(lambda params: value, top_k(0.5))
    updates, state = rule.update(params, rule.init(params), params)
    chex.assert_trees_all_equal(updates, params)
    assert state.compressed_loss == 0


def test_narrow_parameters_train_under_strict_promotion():
    def loss(params, batch):
        return jnp.mean((batch @ params["kernel"]) ** 2)

    params = {"kernel": jnp.ones((4, 2), jnp.bfloat16)}
    batch = jnp.ones((8, 4), jnp.bfloat16)
    rules = [
        cram_plus(loss, top_k(0.5), optax.linear_schedule(0.1, 0.0, 3)),
        sam(loss),
        compressed_sam(loss, top_k(0.5)),
        pulled(top_k(0.5), optax.linear_schedule(0.1, 0.0, 3)),
        pulled(top_k(0.5), 0.1, dual=True, importance=0.9),
    ]
    with jax.numpy_dtype_promotion("strict"):
        for rule in rules:
            updates, _ = rule.update(params, rule.init(params), params, batch=batch)
            chex.assert_trees_all_equal_dtypes(updates, params)


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
