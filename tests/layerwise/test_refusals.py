"""What wanda, sparse_gpt, refit and per_leaf refuse."""

import jax.numpy as jnp
import pytest

from cram_jax import cached, fake_quant, scheduled, top_k
from cram_jax.layerwise import per_leaf, refit, sparse_gpt, wanda

pytestmark = pytest.mark.usefixtures("quick_compilation")

KERNEL = {"kernel": jnp.ones((4, 2))}
GRAM = {"kernel": jnp.eye(4)}

REFUSED = [
    (lambda: wanda(1.0, GRAM), ValueError, "sparsity must be at least 0 and below 1"),
    (lambda: wanda((3, 2), GRAM), ValueError, "n must be between 1 and m=2"),
    (lambda: wanda((1, 2, 3), GRAM), ValueError, r"must be \(n, m\)"),
    (lambda: wanda(0.5, GRAM, scope="all"), ValueError, "scope must be"),
    (lambda: wanda((2, 4), GRAM, scope="layer"), ValueError, "scope must be 'output'"),
    (
        lambda: wanda(0.5, (GRAM, {})),
        TypeError,
        "grams must be what input_gra",
    ),
    (lambda: wanda(0.5, {"kernel": jnp.ones((4, 2))}), ValueError, "inputs, inputs"),
    (lambda: wanda(0.5, {"kernel": jnp.eye(4) / 0}), ValueError, "must be finite"),
    (lambda: sparse_gpt(0.5, GRAM, bits=1), ValueError, "bits must be between"),
    (lambda: sparse_gpt(0.5, GRAM, damping=0), ValueError, "damping must be finite"),
    (lambda: sparse_gpt(0.5, GRAM, block=0), ValueError, "block must be at least 1"),
    (lambda: refit(0.5, GRAM), TypeError, "projector must be a Projector"),
    (lambda: refit(top_k(0.5), GRAM, damping=True), TypeError, "damping must be a num"),
    (lambda: per_leaf({}), ValueError, "projectors must name at least one leaf"),
    (lambda: per_leaf({"a": 0.5}), TypeError, r"projectors\['a'\] must be one that"),
]
REFUSED_AT_USE = [
    (wanda(0.5, {"other": jnp.eye(4)}), "nothing is known of its inputs"),
    (wanda(0.5, {"kernel": jnp.eye(3)}), "must hold 1 x 4 x 4 numbers"),
    (sparse_gpt((1, 3), GRAM), "3 does not divide its 4 inputs"),
    (refit(top_k(0.5), {"other": jnp.eye(4)}), "nothing is known of its inputs"),
    (per_leaf({"other": top_k(0.5)}), "projectors must name leaves of params"),
]


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED)
def test_bad_arguments_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(("projector", "message"), REFUSED_AT_USE)
def test_what_does_not_fit_the_parameters_is_refused_at_init(projector, message):
    with pytest.raises(ValueError, match=message):
        projector.init(KERNEL)


@pytest.mark.parametrize(
    "projector",
    [
        sparse_gpt(0.5, GRAM),
        refit(top_k(0.5), GRAM),
        per_leaf({"kernel": fake_quant(4)}),
        scheduled(fake_quant, lambda count: 4),
    ],
)
def test_what_changes_the_weights_it_keeps_is_not_cached(projector):
    with pytest.raises(ValueError, match="projector must only set entries to zero"):
        cached(projector, every=2)
    cached(per_leaf({"kernel": top_k(0.5)}), every=2)
    cached(wanda(0.5, GRAM), every=2)
