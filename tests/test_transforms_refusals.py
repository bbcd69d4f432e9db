"""What the update rules refuse, and what they say."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from cram_jax import (
    compress,
    compressed_sam,
    cram,
    cram_plus,
    identity,
    keep_pruned,
    sam,
    sparsity_report,
    top_k,
)
from cram_jax.structure import input_grams, trace_structure


def loss_fn(params, batch):
    return jnp.mean((batch @ params["first"]["kernel"] @ params["last"]["kernel"]) ** 2)


def make_params():
    return {
        "first": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
        "last": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)},
    }


@pytest.mark.parametrize(
    "loss",
    [
        lambda: 0.0,
        lambda params, batch, /: 0.0,
        lambda params, *batch: 0.0,
        jax.jit(lambda params, *batch, scale=1.0: 0.0),
    ],
    ids=["no params", "no name", "any number", "any number, compiled"],
)
def test_a_loss_that_takes_nothing_by_name_is_refused(loss):
    with pytest.raises(TypeError, match="loss_fn must take the parameters first and"):
        cram(loss, identity())


@pytest.mark.parametrize("make", [cram, cram_plus, compressed_sam])
def test_wrong_arguments_are_refused_at_construction(make):
    with pytest.raises(TypeError, match="loss_fn must be a function, got 3"):
        make(3, top_k(0.5))
    with pytest.raises(TypeError, match="projector must be a Projector, got 0.5"):
        make(loss_fn, 0.5)
    with pytest.raises(ValueError, match="rho must be at least 0 and finite, got -0.1"):
        make(loss_fn, top_k(0.5), -0.1)
    with pytest.raises(ValueError, match="rho must be at least 0 and finite, got nan"):
        make(loss_fn, top_k(0.5), float("nan"))
    with pytest.raises(ValueError, match="rho must be at least 0 and finite, got inf"):
        make(loss_fn, top_k(0.5), float("inf"))
    for rho in ("big", [0.1], None, True, 0.1j, jnp.array([0.1, 0.2])):
        with pytest.raises(TypeError, match="rho must be a number or a schedule, got"):
            make(loss_fn, top_k(0.5), rho)


@pytest.mark.parametrize("make", [cram, cram_plus])
@pytest.mark.parametrize("flag", ["sparse_gradients", "normalize", "has_aux"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_flags_are_bools(make, flag, value):
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got {value!r}"):
        make(loss_fn, identity(), **{flag: value})


def test_sam_refuses_a_negative_rho():
    with pytest.raises(ValueError, match="rho must be at least 0 and finite, got -1"):
        sam(loss_fn, -1)


def test_update_without_params_is_refused():
    transformation = cram(loss_fn, top_k(0.5))
    params = make_params()
    with pytest.raises(
        ValueError, match=r"params must be given to update\(...\), got None"
    ):
        transformation.update(
            params, transformation.init(params), batch=jnp.ones((2, 4))
        )


def test_a_missing_loss_argument_is_named():
    transformation = cram_plus(lambda params, batch, key: 0.0, identity())
    params = make_params()
    with pytest.raises(
        TypeError, match=r"loss_fn needs the argument 'key', but update\(...\) got"
    ):
        transformation.update(params, transformation.init(params), params, batch=1)


def test_a_loss_that_takes_the_parameters_last_is_refused():
    rule = cram_plus(lambda batch, params: 0.0, identity())
    with pytest.raises(TypeError, match="loss_fn must take the parameters first, got"):
        update(rule, batch=jnp.ones((2, 4)))


@pytest.mark.parametrize("make", [cram_plus, sam])
def test_updates_of_another_shape_are_refused(make):
    """Such as the gradients of all examples, whose mean was forgotten."""
    rule = make(loss_fn, **({} if make is sam else {"projector": top_k(0.5)}))
    params = make_params()
    updates = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)
    message = r"updates\['first/bias'\] must have the shape .* \(8,\), got \(3, 8\)"
    with pytest.raises(ValueError, match=message):
        update(rule, updates, params, batch=jnp.ones((2, 4)))


def test_a_module_without_its_functions_is_explained():
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    rule = cram_plus(lambda model, x: jnp.mean(jax.vmap(model)(x)), top_k(0.5))
    with pytest.raises(TypeError, match=r"gets the parameters, here a MLP, not the m"):
        update(rule, params, params, x=jnp.ones((2, 4)))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: compress(model, top_k(0.5)),
        sparsity_report,
        lambda model: keep_pruned().init(model),
        lambda model: trace_structure(lambda m, x: x, model, jnp.ones(3)),
        lambda model: input_grams(lambda m, x: x, model, [jnp.ones(3)]),
    ],
)
def test_what_is_no_array_is_named(use):
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    message = r"\['activation'\] must be an array, got .*equinox.filter"
    with pytest.raises(TypeError, match=message):
        use(model)


def test_integer_parameters_are_refused():
    with pytest.raises(TypeError, match=r"params\['steps'\] has dtype int32, expected"):
        cram(loss_fn, identity()).init({"steps": jnp.zeros(2, jnp.int32)})


def test_masked_around_cram_is_refused_with_the_right_order():
    params = make_params()
    frozen = {
        name: {"kernel": name == "last", "bias": name == "last"} for name in params
    }
    masked = optax.masked(cram(loss_fn, identity()), frozen)
    partitioned = optax.partition(
        {"train": cram(loss_fn, identity()), "freeze": optax.set_to_zero()},
        {"first": "freeze", "last": "train"},
    )
    for wrong in (masked, partitioned):
        with pytest.raises(
            TypeError, match=r"hidden by optax.masked .* put them after"
        ):
            wrong.init(params)


def update(rule, updates=None, params=None, **extra_args):
    params = make_params() if params is None else params
    updates = params if updates is None else updates
    return rule.update(updates, rule.init(params), params, **extra_args)


@pytest.mark.parametrize("make", [cram, cram_plus, compressed_sam])
def test_the_loss_must_come_once(make):
    with pytest.raises(TypeError, match=r"the loss is missing: .*value_fn=loss_at_par"):
        update(make(None, identity()), batch=jnp.ones((2, 4)))
    with pytest.raises(TypeError, match="the loss is given twice, as loss_fn and as"):
        update(make(loss_fn, identity()), value_fn=loss_fn, batch=jnp.ones((2, 4)))
    with pytest.raises(TypeError, match="value_fn must be a function, got 3"):
        update(make(None, identity()), value_fn=3)
    with pytest.raises(TypeError, match=r"value_fn needs the argument 'batch', but"):
        update(make(None, identity()), value_fn=loss_fn)


@pytest.mark.parametrize("loss", [loss_fn, None])
def test_the_train_state_of_flax_forwards_nothing_and_the_error_says_so(loss):
    state = TrainState.create(
        apply_fn=None, params=make_params(), tx=cram_plus(loss, identity())
    )
    with pytest.raises(TypeError, match=r"TrainState.apply_gradients passes none on"):
        state.apply_gradients(grads=state.params, batch=jnp.ones((2, 4)))


@pytest.mark.parametrize(
    ("returns", "has_aux", "match"),
    [
        ((0.0, {}), False, "must return a scalar, got a tuple of 2; .* has_aux=True"),
        (
            0.0,
            True,
            r"must return \(loss, auxiliary data\) with has_aux=True, got a fl",
        ),
        ((0.0, 1, 2), True, "must return .* got a tuple of 3"),
        (jnp.ones(3), False, r"such as the mean .*, got an array of shape \(3,\)"),
        ((jnp.ones(3), 1), True, r"a scalar, such as .*, got an array of shape \(3,\)"),
        (None, False, "must return a scalar, such as .*, got a NoneType"),
    ],
)
def test_what_the_loss_returns_is_checked(returns, has_aux, match):
    rule = cram(lambda params: returns, identity(), has_aux=has_aux)
    with pytest.raises(TypeError, match=match):
        update(rule)


def nnx_state():
    return nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)


@pytest.mark.parametrize("make_tree", [make_params, nnx_state])
def test_a_loss_that_takes_the_parameters_for_the_model_is_told(make_tree):
    params = make_tree()
    rule = cram(None, identity())
    for loss in (lambda model: model(1.0), lambda model: model.train()):
        with pytest.raises(
            TypeError, match="gets the parameters, here a .*not the model: .*nnx.merge"
        ):
            update(rule, params, params, value_fn=loss)


def test_other_errors_of_the_loss_stay_as_they_are():
    def calls_a_number(params):
        number = 1.0
        return number(params)

    def asks_a_number(params):
        number = 1.0
        return number.mean()

    for loss, error in ((calls_a_number, TypeError), (asks_a_number, AttributeError)):
        with pytest.raises(error, match="'float' object"):
            update(cram(None, identity()), value_fn=loss)


@pytest.mark.parametrize("make", [cram, cram_plus])
def test_gradients_with_something_beside_them_are_refused(make):
    rule, params = make(lambda params: 0.0, identity()), make_params()
    for updates in ((params, {}), (0.0, params)):
        with pytest.raises(ValueError, match="must be only the gradient, got a tuple"):
            update(rule, updates)
    with pytest.raises(ValueError, match="updates must have the structure of params"):
        update(rule, params["first"])


def test_the_parameters_of_lookahead_are_refused():
    lookahead = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    optimizer = optax.chain(cram(loss_fn, identity()), lookahead)
    params = optax.LookaheadParams.init_synced(make_params())
    with pytest.raises(TypeError, match=r"got LookaheadParams; .* with params.fast"):
        optimizer.init(params)


def test_parameters_that_are_no_arrays_are_refused():
    with pytest.raises(TypeError, match=r"params\['f'\] must be an array, .*equinox"):
        cram(loss_fn, identity()).init({"f": jnp.tanh, "w": jnp.ones(2)})


@pytest.mark.parametrize(
    "key", ["0", 0.5, True, None, jnp.zeros(2), jnp.zeros(3, jnp.uint32)], ids=repr
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(TypeError, match="key must be a PRNG key or an integer seed"):
        cram(loss_fn, identity(), key=key)


def test_several_keys_are_refused():
    with pytest.raises(TypeError, match=r"of shape \(2,\): take one of the keys"):
        cram(loss_fn, identity(), key=jax.random.split(jax.random.key(0)))
