"""The authors' PyTorch code, step for step, within 1e-10 in float64."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recordings import recorded_masks
from watching import Watched

import cram_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 1e-10
DATA = Path(__file__).parent / "data" / "golden"
LAYERS = ("fc0", "fc1", "fc2")


def loss_fn(params, x, y):
    for name in LAYERS[:-1]:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    logits = x @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


class Trace:
    """A recorded run, its arrays in Flax's layout (in, out)."""

    def __init__(self, path):
        self.arrays = dict(np.load(path))
        self.meta = json.loads(str(self.arrays.pop("meta")))

    def tree(self, prefix):
        return {
            layer: {
                "kernel": jnp.asarray(self.arrays[f"{prefix}/{layer}.weight"].T),
                "bias": jnp.asarray(self.arrays[f"{prefix}/{layer}.bias"]),
            }
            for layer in LAYERS
        }

    def masks(self, step):
        """The recorded masks; what the reference has no mask for is kept."""
        masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), self.tree("init"))
        for layer in LAYERS:
            recorded = self.arrays.get(f"s{step}/mask/{layer}.weight")
            if recorded is not None:
                masks[layer]["kernel"] = jnp.asarray(recorded.T, bool)
        return masks

    def projector(self, step):
        """Ours for that step, allowing for the listed quirks of the reference."""
        cram, facts = self.meta["cram"], self.meta["steps"][step]
        if self.meta["optimizer_class"] == "SAM":
            return cram_jax.identity()
        if "straddle" in self.meta["name"]:
            return recorded_masks(
                self.masks(step)
            )  # groups across rows, which are not ours
        if "nm" in facts:
            return cram_jax.n_m(*facts["nm"])
        # It keeps k - 1 entries, and fewer under ties: ask for as many as it kept.
        kept, size = sum(facts["kept"].values()), sum(facts["numel"].values())
        if cram["unif_prune"]:
            return cram_jax.top_k(
                1 - kept / size,
                scope="layer",
                where=lambda path, _: path == "fc1/kernel",
            )
        projector = cram_jax.top_k(1 - kept / size)
        if "mask_freq" in cram:
            return cram_jax.cached(projector, every=cram["mask_freq"])
        return projector

    def transformation(self, projector):
        cram, rho = self.meta["cram"], self.meta["rho"]
        if self.meta["optimizer_class"] == "SAM":
            return cram_jax.sam(loss_fn, rho)
        make = cram_jax.cram_plus if cram["plus_version"] else cram_jax.cram
        return make(
            loss_fn,
            projector,
            rho,
            sparse_gradients=cram["sparse_grad"],
            normalize=cram["grad_norm"],
        )


def assert_close(ours, recorded, what):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=TOLERANCE, err_msg=what
        ),
        ours,
        recorded,
    )


def replay(path):
    trace = Trace(path)
    params = trace.tree("init")
    descend = optax.chain(
        optax.add_decayed_weights(trace.meta["base_kwargs"]["weight_decay"]),
        optax.sgd(
            trace.meta["base_kwargs"]["lr"],
            momentum=trace.meta["base_kwargs"]["momentum"],
        ),
    )
    descend_state = descend.init(params)
    projector_states = {}
    for step in range(trace.meta["n_steps"]):
        seen = []
        projector = trace.projector(step)
        watched = Watched(
            projector,
            lambda params, key, projection, seen=seen: seen.append(projection),
        )
        transformation = trace.transformation(watched)
        x, y = (jnp.asarray(trace.arrays[f"s{step}/{name}"]) for name in "xy")
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        state = transformation.init(params)
        # The reference counts the uses of each sparsity by itself, as one_of does.
        drawn = trace.meta["steps"][step].get("sparsity_chosen")
        state = state._replace(
            projector_state=projector_states.get(drawn, state.projector_state)
        )
        direction, state = transformation.update(grads, state, params, x=x, y=y)
        projector_states[drawn] = state.projector_state
        updates, descend_state = descend.update(direction, descend_state, params)
        params = optax.apply_updates(params, updates)

        where = f"{trace.meta['name']}, step {step}: "
        assert_close(loss, trace.arrays[f"s{step}/loss"], where + "loss")
        assert_close(grads, trace.tree(f"s{step}/g"), where + "gradient")
        if seen:
            (compressed, masks) = seen[-1]
            assert_close(
                compressed, trace.tree(f"s{step}/theta_c"), where + "compressed"
            )
            jax.tree.map(np.testing.assert_array_equal, masks, trace.masks(step))
            inner = jax.grad(loss_fn)(compressed, x, y)
            assert_close(inner, trace.tree(f"s{step}/gc"), where + "inner gradient")
        assert_close(
            state.compressed_loss, trace.arrays[f"s{step}/loss_c"], where + "inner loss"
        )
        assert_close(direction, trace.tree(f"s{step}/dir"), where + "direction")
        assert_close(params, trace.tree(f"s{step}/theta"), where + "parameters")
        momentum = optax.tree.get(descend_state, "trace")
        assert_close(momentum, trace.tree(f"s{step}/mom"), where + "momentum")
    assert step + 1 == len(trace.meta["steps"])


@pytest.mark.parametrize("path", sorted(DATA.glob("*.npz")), ids=lambda path: path.stem)
def test_follows_the_authors_code(path):
    with jax.enable_x64(True):
        replay(path)


def recorded_at_length(shared):
    return {path.name: path for path in sorted((shared / "golden").glob("mlp_*.npz"))}


def test_follows_every_other_recording_of_the_authors_code(shared):
    paths = recorded_at_length(shared)
    for path in DATA.glob("*.npz"):
        del paths[path.name]
    with jax.enable_x64(True):
        for path in paths.values():
            replay(path)


@pytest.mark.nightly
def test_follows_every_recorded_step_of_the_authors_code(shared):
    """Of those in tests/data the later steps, too."""
    with jax.enable_x64(True):
        for path in recorded_at_length(shared).values():
            replay(path)
