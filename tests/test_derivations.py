"""Every update rule against float64 NumPy with gradients by hand, within 1e-10."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

import cram_jax
from cram_jax import compose, fake_quant, identity, n_m, one_of, top_k

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
RHO, RATE, STEPS = 0.3, 0.05, 12


def make_params():
    rng = np.random.default_rng(0)
    return {
        "first": {"kernel": rng.normal(size=(8, 16)), "bias": rng.normal(size=16)},
        "last": {"kernel": rng.normal(size=(16, 3)) / 4, "bias": np.zeros(3)},
    }


def make_batch(step):
    rng = np.random.default_rng(1 + step)
    return {"x": rng.normal(size=(10, 8)), "y": rng.normal(size=(10, 3))}


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    outputs = hidden @ params["last"]["kernel"] + params["last"]["bias"]
    return jnp.mean((outputs - y) ** 2)


def gradient(params, x, y):
    """The loss and its gradient, by hand."""
    hidden = np.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    error = hidden @ params["last"]["kernel"] + params["last"]["bias"] - y
    outer = 2 * error / error.size
    inner = (outer @ params["last"]["kernel"].T) * (1 - hidden**2)
    return np.mean(error**2), {
        "first": {"kernel": x.T @ inner, "bias": inner.sum(0)},
        "last": {"kernel": hidden.T @ outer, "bias": outer.sum(0)},
    }


def both(function, one, other):
    return jax.tree.map(function, one, other)


def masked(mask, tree):
    return both(lambda m, leaf: np.where(m, leaf, 0), mask, tree)


def norm(tree):
    return np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def kernels_only(compress):
    """A projection of the two kernels together; biases are kept."""

    def project(params):
        kernels = [params["first"]["kernel"], params["last"]["kernel"]]
        values, masks = zip(*compress(kernels), strict=True)
        ones = {name: np.ones_like(params[name]["bias"], bool) for name in params}
        return tuple(
            {
                name: {"kernel": kernel, "bias": biases[name]}
                for name, kernel in zip(("first", "last"), kernels, strict=True)
            }
            for kernels, biases in (
                (values, {name: params[name]["bias"] for name in params}),
                (masks, ones),
            )
        )

    return project


def keep(kernels, masks):
    return [(np.where(m, k, 0), m) for k, m in zip(kernels, masks, strict=True)]


def by_magnitude(sparsity):
    def compress(kernels):
        size = sum(kernel.size for kernel in kernels)
        k = size - int(sparsity * size)
        return keep(kernels, references.keep_largest(kernels, k))

    return compress


def by_groups(n, m):
    def compress(kernels):
        masks = [
            references.n_m(k, n, m) if k.shape[0] % m == 0 else np.ones_like(k, bool)
            for k in kernels
        ]
        return keep(kernels, masks)

    return compress


def by_rounding(bits, **options):
    def compress(kernels):
        return [
            (references.fake_quant(k, bits, **options), np.ones_like(k, bool))
            for k in kernels
        ]

    return compress


def one_after_the_other(first, second):
    def compress(kernels):
        pruned = first(kernels)
        rounded = second([value for value, _ in pruned])
        return [
            (value, mask) for (value, _), (_, mask) in zip(rounded, pruned, strict=True)
        ]

    return compress


PROJECTORS = {
    "dense": (
        identity(),
        lambda kernels: [(k, np.ones_like(k, bool)) for k in kernels],
    ),
    "50 %": (top_k(0.5), by_magnitude(0.5)),
    "90 %": (top_k(0.9), by_magnitude(0.9)),
    "2:4": (n_m(2, 4), by_groups(2, 4)),
    "4:8": (n_m(4, 8), by_groups(4, 8)),
    "4 bit": (fake_quant(4), by_rounding(4)),
    "3 bit, asymmetric": (
        fake_quant(3, symmetric=False, per="tensor"),
        by_rounding(3, symmetric=False, per="tensor"),
    ),
    "50 % and 4 bit": (
        compose(top_k(0.5), fake_quant(4)),
        one_after_the_other(by_magnitude(0.5), by_rounding(4)),
    ),
}


def cram(gradient_at, params, project, rho=RHO, sparse=True, normalize=False):
    _, dense = gradient_at(params)
    radius = rho / norm(dense) if normalize else rho
    compressed, mask = project(both(lambda p, g: p + radius * g, params, dense))
    loss, inner = gradient_at(compressed)
    return loss, dense, masked(mask, inner) if sparse else inner


def cram_plus(*arguments, **options):
    loss, dense, inner = cram(*arguments, **options)
    return loss, both(np.add, dense, inner)


def compressed_sam(gradient_at, params, project):
    compressed, mask = project(params)
    ascent = masked(mask, gradient_at(compressed)[1])
    radius = RHO / norm(ascent)
    compressed, mask = project(both(lambda p, a: p + radius * a, params, ascent))
    loss, inner = gradient_at(compressed)
    return loss, masked(mask, inner)


# Ours, and the derivation: (projector) -> rule; (gradient_at, params, project) -> u.
RULES = {
    "CrAM": (
        lambda p: cram_jax.cram(loss_fn, p, RHO),
        lambda *a: cram(*a)[::2],
    ),
    "CrAM, normalised": (
        lambda p: cram_jax.cram(loss_fn, p, RHO, normalize=True),
        lambda *a: cram(*a, normalize=True)[::2],
    ),
    "CrAM+": (lambda p: cram_jax.cram_plus(loss_fn, p, RHO), cram_plus),
    "CrAM+, dense gradients": (
        lambda p: cram_jax.cram_plus(loss_fn, p, RHO, sparse_gradients=False),
        lambda *a: cram_plus(*a, sparse=False),
    ),
    "Top-K": (
        lambda p: cram_jax.cram(loss_fn, p, 0.0),
        lambda *a: cram(*a, rho=0)[::2],
    ),
    "Top-K+": (
        lambda p: cram_jax.cram_plus(loss_fn, p, 0.0),
        lambda *a: cram_plus(*a, rho=0),
    ),
    "C-SAM": (lambda p: cram_jax.compressed_sam(loss_fn, p, RHO), compressed_sam),
}


def train(rule, follow, steps=STEPS):
    """Runs ours; ``follow(step, gradient_at, params, u, loss)`` judges every step."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, make_params())
        optimizer = optax.chain(rule, optax.sgd(RATE))
        state = optimizer.init(params)

        @jax.jit
        def advance(params, state, batch):
            grads = jax.grad(loss_fn)(params, **batch)
            updates, state = optimizer.update(grads, state, params, **batch)
            return updates, optax.apply_updates(params, updates), state

        reference = make_params()
        for step in range(steps):
            batch = make_batch(step)
            updates, params, state = advance(params, state, batch)
            u = jax.tree.map(lambda leaf: np.asarray(leaf) / -RATE, updates)
            loss = float(state[0].compressed_loss)
            expected = follow(
                step, lambda p, b=batch: gradient(p, **b), reference, u, loss
            )
            reference = both(lambda p, e: p - RATE * e, reference, expected)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE),
            params,
            reference,
        )


def cases():
    """Every projector under CrAM+, every rule with masks and values; by night all."""
    for rule, projector in itertools.product(RULES, PROJECTORS):
        is_usual = rule == "CrAM+" or projector in ("2:4", "50 % and 4 bit")
        marks = [] if is_usual else [pytest.mark.nightly]
        yield pytest.param(rule, projector, marks=marks)


@pytest.mark.parametrize(("rule", "projector"), [*cases()])
def test_twelve_steps_follow_the_derivation(rule, projector):
    make, derive = RULES[rule]
    ours, compress = PROJECTORS[projector]

    def follow(step, gradient_at, params, u, loss):
        expected_loss, expected = derive(gradient_at, params, kernels_only(compress))
        np.testing.assert_allclose(loss, expected_loss, **TOLERANCE)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), u, expected
        )
        return expected

    train(make(ours), follow)


def test_sam_follows_the_derivation():
    def follow(step, gradient_at, params, u, loss):
        _, dense = gradient_at(params)
        uphill = both(lambda p, g: p + RHO * g / norm(dense), params, dense)
        expected_loss, expected = gradient_at(uphill)
        np.testing.assert_allclose(loss, expected_loss, **TOLERANCE)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), u, expected
        )
        return expected

    train(cram_jax.sam(loss_fn, RHO), follow)


@pytest.mark.parametrize(
    "names",
    [("50 %", "90 %"), ("2:4", "4:8"), ("50 %", "2:4", "4 bit", "50 % and 4 bit")],
    ids=str,
)
def test_a_mixture_takes_one_of_its_members_at_each_step(names):
    drawn = []

    def follow(step, gradient_at, params, u, loss):
        results = {
            name: cram_plus(gradient_at, params, kernels_only(PROJECTORS[name][1]))
            for name in names
        }
        # Two agree where all that either keeps of a layer is nothing.
        name, *_ = [n for n, (value, _) in results.items() if abs(value - loss) < 1e-10]
        drawn.append(name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE),
            u,
            results[name][1],
        )
        return results[name][1]

    projector = one_of(*(PROJECTORS[name][0] for name in names))
    train(cram_jax.cram_plus(loss_fn, projector, RHO), follow, steps=24)
    assert set(drawn) == set(names)


def test_cached_masks_serve_for_three_steps():
    masks = {}

    def follow(step, gradient_at, params, u, loss):
        _, dense = gradient_at(params)
        perturbed = both(lambda p, g: p + RHO * g, params, dense)
        if step % 3 == 0:
            masks["now"] = kernels_only(by_magnitude(0.5))(perturbed)[1]
        expected_loss, inner = gradient_at(masked(masks["now"], perturbed))
        expected = both(np.add, dense, masked(masks["now"], inner))
        np.testing.assert_allclose(loss, expected_loss, **TOLERANCE)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), u, expected
        )
        return expected

    projector = cram_jax.cached(top_k(0.5), every=3)
    train(cram_jax.cram_plus(loss_fn, projector, RHO), follow)
