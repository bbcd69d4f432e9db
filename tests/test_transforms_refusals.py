"""What the update rules refuse, and what they say."""

import jax.numpy as jnp
import optax
import pytest

from cram_jax import compressed_sam, cram, cram_plus, identity, sam, top_k


def loss_fn(params, batch):
    return jnp.mean((batch @ params["first"]["kernel"] @ params["last"]["kernel"]) ** 2)


def make_params():
    return {
        "first": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
        "last": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)},
    }


@pytest.mark.parametrize(
    "loss", [lambda: 0.0, lambda params, batch, /: 0.0], ids=["no params", "no name"]
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
