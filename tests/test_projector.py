import jax
import jax.numpy as jnp
import pytest

from cram_jax import Projection, identity, stateless

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
