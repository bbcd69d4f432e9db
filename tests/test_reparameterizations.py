"""Functions inside the loss, beside float64 NumPy and PyTorch's derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cram_jax import (
    cached,
    fake_quant,
    gated,
    keep_largest,
    n_m,
    open_share,
    scored,
    scores_like,
    soft_threshold,
    straight_through,
    thresholded,
    top_k,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

generator = np.random.default_rng(0)
WEIGHTS, GRADIENT, SCORES = generator.normal(size=(3, 5, 4))
BIAS = generator.normal(size=4)


def value_and_gradients(function, scores):
    """Of the product with GRADIENT, by weights and by scores."""

    def product(weights, scores):
        params = {"dense": {"bias": jnp.asarray(BIAS), "kernel": weights}}
        result = function(params, {"dense/kernel": scores})["dense"]
        np.testing.assert_array_equal(result["bias"], BIAS)
        return jnp.sum(result["kernel"] * GRADIENT), result["kernel"]

    with jax.enable_x64(True):
        found, gradients = jax.value_and_grad(product, (0, 1), has_aux=True)(
            jnp.asarray(WEIGHTS), jnp.asarray(scores)
        )
    return found[1], *gradients


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_soft_thresholds_and_their_gradients():
    """Kusupati et al., equations 6 to 8."""
    s = -0.4
    kept = np.abs(WEIGHTS) > sigmoid(s)
    assert 0 < kept.sum() < kept.size
    value, by_weights, by_threshold = value_and_gradients(soft_threshold, s)
    expected = np.sign(WEIGHTS) * np.maximum(np.abs(WEIGHTS) - sigmoid(s), 0)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(by_weights, GRADIENT * kept, rtol=1e-14)
    slope = sigmoid(s) * (1 - sigmoid(s))
    total = -slope * np.sum(GRADIENT * np.sign(WEIGHTS) * kept)
    np.testing.assert_allclose(by_threshold, total, rtol=1e-13)


def test_soft_thresholds_train_as_in_pytorch():
    """Five steps of SGD whose weight decay moves the threshold too."""
    torch = pytest.importorskip("torch")
    weights = torch.tensor(WEIGHTS, requires_grad=True)
    s = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(GRADIENT)
    descend = torch.optim.SGD([weights, s], lr=0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(5):
        descend.zero_grad()
        size = torch.relu(weights.abs() - torch.sigmoid(s))
        ((torch.sign(weights) * size - target) ** 2).sum().backward()
        descend.step()

    def loss(params):
        thin = soft_threshold({"w": params["w"]}, {"w": params["s"]})
        return jnp.sum((thin["w"] - GRADIENT) ** 2)

    with jax.enable_x64(True):
        params = {"w": jnp.asarray(WEIGHTS), "s": jnp.asarray(-3.0)}
        momentum = jax.tree.map(jnp.zeros_like, params)
        for _ in range(5):
            grads = jax.grad(loss)(params)
            momentum = jax.tree.map(
                lambda m, g, p: 0.9 * m + g + 0.2 * p, momentum, grads, params
            )
            params = jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum)
    np.testing.assert_allclose(params["w"], weights.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(params["s"], s.item(), rtol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_the_highest_scores_stay_and_all_scores_learn(share):
    """Sanh et al., section 4: dL/dS = dL/dW' W, also where the mask is zero."""
    value, by_weights, by_scores = value_and_gradients(
        lambda params, scores: scored(params, scores, share), SCORES
    )
    mask = np.zeros(SCORES.size, bool)
    highest = np.argsort(-SCORES.ravel(), kind="stable")
    mask[highest[: int(np.floor(share * SCORES.size))]] = True
    mask = mask.reshape(SCORES.shape)
    np.testing.assert_array_equal(value, WEIGHTS * mask)
    np.testing.assert_array_equal(by_weights, GRADIENT * mask)
    np.testing.assert_array_equal(by_scores, GRADIENT * WEIGHTS)


@pytest.mark.parametrize("dtypes", ["float32 bfloat16", "bfloat16 float32"])
def test_gradients_have_the_dtypes_of_what_they_are_of(dtypes):
    of_weights, of_scores = dtypes.split()
    weights = {"k": jnp.full((2, 2), 1.0078125, of_weights)}
    scores = {"k": jnp.full((2, 2), 2.0, of_scores)}
    by_weights, by_scores = jax.grad(
        lambda w, s: (scored(w, s, 0.5)["k"] * jnp.float32(1 / 3)).sum(), (0, 1)
    )(weights, scores)
    assert by_weights["k"].dtype == of_weights
    assert by_scores["k"].dtype == of_scores


def test_scores_above_a_threshold_stay_and_half_a_per_cent_at_least():
    for tau, mask in (
        (0.6, sigmoid(SCORES) > 0.6),
        (1.0, np.isin(SCORES, SCORES.max())),
    ):
        value, by_weights, by_scores = value_and_gradients(
            lambda params, scores, tau=tau: thresholded(params, scores, tau), SCORES
        )
        np.testing.assert_array_equal(value, WEIGHTS * mask)
        np.testing.assert_array_equal(by_weights, GRADIENT * mask)
        np.testing.assert_array_equal(by_scores, GRADIENT * WEIGHTS)


def test_a_share_may_be_traced():
    @jax.jit
    def zeros(share):
        params, scores = {"w": jnp.asarray(WEIGHTS)}, {"w": jnp.asarray(SCORES)}
        return jnp.sum(scored(params, scores, share)["w"] == 0)

    assert [int(zeros(share)) for share in (0.0, 0.3, 1.0)] == [20, 14, 0]


def test_gates_are_hard_concrete():
    """Louizos et al., equations 10 to 13, from the draws themselves."""
    gamma, zeta, beta = -0.1, 1.1, 2 / 3
    key = jax.random.key(0)
    value, by_weights, _ = value_and_gradients(
        lambda params, scores: gated(params, scores, key), SCORES
    )
    with jax.enable_x64(True):
        u = np.asarray(
            jax.random.uniform(
                jax.random.fold_in(key, 1), (5, 4), jnp.float64, 1e-6, 1 - 1e-6
            )
        )
    s = sigmoid((np.log(u) - np.log(1 - u) + SCORES) / beta)
    z = np.clip(s * (zeta - gamma) + gamma, 0, 1)
    assert {0.0, 1.0} < set(z.ravel())
    np.testing.assert_allclose(value, z * WEIGHTS, rtol=1e-12)
    np.testing.assert_allclose(by_weights, z * GRADIENT, rtol=1e-12)
    value, *_ = value_and_gradients(gated, SCORES)
    z = np.clip(sigmoid(SCORES) * (zeta - gamma) + gamma, 0, 1)
    np.testing.assert_allclose(value, z * WEIGHTS, rtol=1e-12)


def test_gates_of_narrow_scores_have_the_same_tails():
    """Of gates that are nearly always open, 0.15 % are shut, in bfloat16 too."""
    ones = {"w": jnp.ones((400, 500), jnp.bfloat16)}
    gates = {"w": jnp.full((400, 500), 5, jnp.bfloat16)}
    drawn = gated(ones, gates, jax.random.key(0))["w"]
    assert drawn.dtype == jnp.bfloat16
    shut = 1 - sigmoid(5 - 2 / 3 * np.log(0.1 / 1.1))
    # 200,000 draws: a deviation of 0.00009
    np.testing.assert_allclose(jnp.mean(drawn == 0), shut, atol=0.0005)


@pytest.mark.parametrize("method", [soft_threshold, gated, scored, thresholded])
def test_wide_scores_do_not_widen_the_weights(method):
    params = {"w": jnp.ones((4, 8), jnp.bfloat16)}
    scores = {"w": jnp.zeros((4, 8) if method is not soft_threshold else ())}
    needs = {scored: (0.5,), thresholded: (0.5,)}.get(method, ())
    assert method(params, scores, *needs)["w"].dtype == jnp.bfloat16


def test_the_expected_share_of_open_gates_is_that_of_many_draws():
    """P(z > 0), of equation 12, by counting."""
    gates = {"w": jnp.linspace(-3, 3, 20_000).reshape(100, 200)}
    ones = {"w": jnp.ones((100, 200))}
    drawn = jnp.mean(gated(ones, gates, jax.random.key(1))["w"] > 0)
    # 20,000 draws: a deviation of 0.0035 at most
    np.testing.assert_allclose(open_share(gates), drawn, atol=0.012)


@pytest.mark.parametrize("projector", [top_k(0.6), n_m(2, 4), fake_quant(3)])
def test_straight_through_is_exact_forwards_and_the_identity_backwards(projector):
    params = {"kernel": jnp.asarray(generator.normal(size=(8, 3)), jnp.float32)}
    weights = {"kernel": jnp.asarray(generator.normal(size=(8, 3)), jnp.float32)}
    apply = straight_through(projector)
    (expected, _), _ = projector.project(params, projector.init(params), None)
    np.testing.assert_array_equal(apply(params)["kernel"], expected["kernel"])

    def product(params):
        return jnp.sum(apply(params)["kernel"] * weights["kernel"])

    found = jax.grad(product)(params)
    np.testing.assert_array_equal(found["kernel"], weights["kernel"])


def test_the_largest_values_in_any_order_of_signs():
    values = [-3.0, -1.0, -0.0, 0.0, 0.5, 2.0, np.inf, -np.inf, 0.5, -1.0]
    for dtype in (jnp.float32, jnp.bfloat16):
        for seed in range(4):
            drawn = np.random.default_rng(seed).choice(values, (2, 9))
            order = np.argsort(-drawn.ravel(), kind="stable")
            for k in range(0, 19, 3):
                expected = np.zeros(18, bool)
                expected[order[:k]] = True
                arrays = [jnp.asarray(row, dtype) for row in drawn]
                masks = keep_largest(arrays, k, signed=True)
                np.testing.assert_array_equal(np.concatenate(masks), expected)
    (mask,) = keep_largest([jnp.array([1.0, -jnp.nan, jnp.inf])], 1, signed=True)
    assert mask.tolist() == [False, True, False]


def test_what_they_cannot_do_is_said():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"got \['kernal'\]; the parameters are"):
        scored(params, {"kernal": jnp.ones((2, 2))}, 0.5)
    with pytest.raises(ValueError, match="each must be 'weight' or 'leaf'"):
        scores_like(params, 0.0, each="layer")
    with pytest.raises(ValueError, match="needs a projector without state, got cached"):
        straight_through(cached(top_k(0.5), every=2))(params)
    with pytest.raises(TypeError, match="projector must be a Projector, got 0.5"):
        straight_through(0.5)
    assert set(scores_like(params, 0.0)) == {"kernel"}


@pytest.mark.parametrize("shape", [(), (1, 3), (3, 3), (4, 3, 1)])
def test_scores_are_one_for_each_weight(shape):
    params = {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}
    message = r"scores\['kernel'\] must be .* \(4, 3\), got the shape \("
    for method in (scored, thresholded):
        with pytest.raises(ValueError, match=message):
            method(params, {"kernel": jnp.zeros(shape)}, 0.5)


@pytest.mark.parametrize("shape", [(3, 3), (1, 4, 3)])
def test_gates_and_thresholds_broadcast_to_their_leaf(shape):
    params = {"kernel": jnp.ones((4, 3))}
    message = r"scores\['kernel'\] must broadcast .* \(4, 3\), got the shape \("
    for method in (soft_threshold, gated):
        with pytest.raises(ValueError, match=message):
            method(params, {"kernel": jnp.zeros(shape)})
        for fits in ((), (3,), (4, 1), (4, 3)):
            values = method(params, {"kernel": jnp.zeros(fits)})["kernel"]
            np.testing.assert_allclose(values, jnp.full((4, 3), 0.5), rtol=1e-6)


def test_gates_draw_with_a_seed_as_with_its_key():
    params, scores = {"kernel": jnp.ones((4, 3))}, {"kernel": jnp.zeros((4, 3))}
    seeded, drawn = (gated(params, scores, key) for key in (3, jax.random.key(3)))
    np.testing.assert_array_equal(seeded["kernel"], drawn["kernel"])
    with pytest.raises(TypeError, match="key must be a PRNG key or an integer seed"):
        gated(params, scores, "3")


@pytest.mark.parametrize("function", [soft_threshold, scored, thresholded, gated])
@pytest.mark.parametrize("of_scores", ["bfloat16", "float32"])
def test_scores_of_other_dtypes_train_under_strict_promotion(function, of_scores):
    params = {"a": jnp.asarray(WEIGHTS, jnp.bfloat16), "b": jnp.asarray(WEIGHTS)}
    scores = {"a": jnp.asarray(SCORES, of_scores), "b": jnp.asarray(SCORES)}
    further = [] if function is soft_threshold else [jnp.array(0.4)]
    further = [3] if function is gated else further

    def product(scores):
        result = function(params, scores, *further)
        return sum(jnp.sum(result[path] * params[path], dtype=float) for path in params)

    expected = jax.grad(product)(scores)
    with jax.numpy_dtype_promotion("strict"):
        gradient = jax.grad(product)(scores)
        share = open_share(scores)
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)
    np.testing.assert_allclose(share, open_share(scores))


def test_a_leaf_without_entries_has_no_share_of_open_gates():
    log_alpha = {"a": jnp.zeros((0, 4)), "b": jnp.array([99.0, -99.0])}
    assert open_share(log_alpha) == 0.5


def test_arrays_of_numpy_are_taken():
    params, scores = {"kernel": WEIGHTS}, {"kernel": SCORES}
    for function in (soft_threshold, gated):
        ours = function(params, scores)["kernel"]
        expected = function(*jax.tree.map(jnp.asarray, (params, scores)))["kernel"]
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("function", "name"), [(scored, "share"), (thresholded, "threshold")]
)
def test_percent_are_no_share(function, name):
    params = {"kernel": jnp.asarray(WEIGHTS)}
    for value in (90, jnp.array(-0.5), np.nan):
        with pytest.raises(ValueError, match=f"{name} must be from 0 to 1, got"):
            function(params, params, value)
