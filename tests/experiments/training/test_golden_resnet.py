"""ResNet-20 of the authors' PyTorch code, step for step, in float64.

Our model with converted weights, batch norm only from the dense pass, masks, and
recalibration. The recordings are large: they are read from the shared folder.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from recordings import recorded_masks
from watching import Watched

import cram_jax
from experiments.images.resnet import ResNet

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 1e-10
STATISTICS = {"running_mean": "mean", "running_var": "var"}


def place(name):
    """Where a tensor of the reference lies in our trees."""
    *owner, kind = name.split(".")
    if owner == ["fc"]:
        return ("head", {"weight": "kernel", "bias": "bias"}[kind])
    if owner[0].startswith("layer"):
        block = f"stage{owner[0][-1]}_block{int(owner[1]) + 1}"
        module = {"downsample.0": "shortcut", "downsample.1": "shortcut_norm"}.get(
            ".".join(owner[2:]), owner[2].replace("bn", "norm")
        )
        path = (block, module)
    else:
        path = ("stem", {"conv1": "conv", "bn1": "norm"}[owner[0]])
    is_norm = "norm" in path[-1]
    names = {"weight": "scale" if is_norm else "kernel", "bias": "bias", **STATISTICS}
    return (*path, names[kind])


def convert(value):
    """From (out, in, h, w) and (out, in) to Flax's layout."""
    order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(np.ndim(value))
    value = value if order is None else np.transpose(value, order)
    # What float32 holds exactly was stored so; masks stay unchanged.
    return value if value.dtype == bool else np.asarray(value, np.float64)


def tree(arrays, prefix, statistics=False):
    """The parameters, or the statistics, under a prefix."""
    made = {}
    for key, value in arrays.items():
        name = key.removeprefix(prefix)
        if name == key or name.endswith("num_batches_tracked"):
            continue
        if (name.split(".")[-1] in STATISTICS) == statistics:
            *path, last = place(name)
            node = made
            for part in path:
                node = node.setdefault(part, {})
            node[last] = convert(value)
    return made


def masks_of(arrays, prefix, names, shapes, params):
    masks = jax.tree.map(lambda leaf: np.ones_like(leaf, bool), params)
    bits = np.unpackbits(arrays[prefix + "mask_bits"]).astype(bool)
    start = 0
    for name in names:
        size = int(np.prod(shapes[name]))
        module, *rest, last = place(name)
        node = masks[module]
        for part in rest:
            node = node[part]
        node[last] = convert(bits[start : start + size].reshape(shapes[name]))
        start += size
    return masks


def images(array):
    return np.asarray(np.transpose(array, (0, 2, 3, 1)), np.float64)


def convolve(x, kernel, strides, padding, **options):
    """A convolution as one product of matrices.

    XLA on CPU has a library for those in float64, and slow loops for convolutions.
    """
    window = kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    ends = [side - size + 1 for side, size in zip(x.shape[1:3], window, strict=True)]
    patches = [
        x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
        for i, j in np.ndindex(window)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def make_model():
    model = ResNet((16, 32, 64), (3, 3, 3), 3, 10, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv):
            module.conv_general_dilated = convolve
    return model


GRAPH, *_ = nnx.split(nnx.eval_shape(make_model), nnx.Param, nnx.BatchStat)


@partial(jax.jit, static_argnames="training")
def forward(params, batch_stats, x, training):
    params, batch_stats = map(nnx.State, (params, batch_stats))
    model = nnx.merge(GRAPH, params, batch_stats, copy=True)
    logits = model(x, training=training)
    return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def training_pass(params, batch_stats, x):
    return forward(params, batch_stats, x, training=True)[1]


def loss_fn(params, batch_stats, x, y):
    logits, batch_stats = forward(params, batch_stats, x, training=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), batch_stats


def lookup(node, path):
    for part in path:
        node = node[part]
    return node


@partial(jax.jit, static_argnames=("rho", "sparsity"))
def cram_plus_pass(params, masks, rho, sparsity, **inputs):
    """The loss, its gradient, CrAM+'s direction and state, the compressed weights.

    The masks serve where no sparsity is given.
    """
    projector = recorded_masks(masks) if sparsity is None else cram_jax.top_k(sparsity)
    seen = []
    watched = Watched(
        projector, lambda params, key, projection: seen.append(projection)
    )
    rule = cram_jax.cram_plus(loss_fn, watched, rho, has_aux=True)
    dense = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, batch_stats), grads = dense(params, **inputs)
    direction, state = rule.update(grads, rule.init(params), params, **inputs)
    return loss, batch_stats, grads, direction, state, *seen


DESCEND = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))


@jax.jit
def descend(params, state, direction):
    updates, state = DESCEND.update(direction, state, params)
    return optax.apply_updates(params, updates), state


def unbiased(batch_stats, old, batch, momentum=0.9):
    """Our running variances as PyTorch would have them: of the sample, not biased."""

    def correct(path, new, before):
        if path[-1].key != "var":
            return new
        side = {"stage2": 16, "stage3": 8}.get(path[0].key.split("_")[0], 32)
        count = batch * side * side
        return momentum * before + (new - momentum * before) * count / (count - 1)

    return jax.tree.map_with_path(correct, batch_stats, old)


def assert_close(ours, recorded, tolerance=TOLERANCE):
    assert jax.tree.structure(ours) == jax.tree.structure(recorded)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        ours,
        recorded,
    )


def load(path):
    arrays = dict(np.load(path))
    return arrays, json.loads(str(arrays.pop("meta")))


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_a_convolution_is_a_product_of_matrices(size, stride):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(2, 8, 8, 3)), rng.normal(size=(size, size, 3, 4))
        where = ((stride, stride), [(size // 2, size // 2)] * 2)
        layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        expected = jax.lax.conv_general_dilated(x, kernel, *where, **layout)
        assert_close(convolve(x, kernel, *where, **layout), expected)


@pytest.mark.filterwarnings("ignore:This function is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    # Of N:M the masks are the recorded ones: little that the first does not show.
    ["topk_global_70", pytest.param("nm24", marks=pytest.mark.nightly)],
)
def test_steps_of_resnet20_follow_the_authors_code(shared, name):
    with jax.enable_x64(True):
        arrays, meta = load(shared / "golden" / f"resnet20_{name}_plus_spgrad.npz")
        params = tree(arrays, "init/")
        batch_stats = tree(arrays, "init/", statistics=True)
        descend_state = DESCEND.init(params)
        for step, facts in enumerate(meta["steps"]):
            masks = masks_of(
                arrays,
                f"s{step}/",
                meta["masked_params"],
                meta["masked_shapes"],
                params,
            )
            inputs = {
                "batch_stats": batch_stats,
                "x": images(arrays[f"s{step}/x"]),
                "y": arrays[f"s{step}/y"],
            }
            # The first convolution has 3 channels: its N:M groups straddle pixels.
            sparsity = 1 - facts["mask_total"] / facts["mask_numel"]
            sparsity = None if name == "nm24" else sparsity
            loss, batch_stats, grads, direction, state, projection = cram_plus_pass(
                params, masks, meta["rho"], sparsity, **inputs
            )
            assert_close(loss, arrays[f"s{step}/loss"])
            assert_close(state.compressed_loss, arrays[f"s{step}/loss_c"])
            jax.tree.map(np.testing.assert_array_equal, projection.masks, masks)
            for quantity, ours in (
                ("g", grads),
                ("theta_c", projection.params),
                ("dir", direction),
            ):
                norms = [
                    np.linalg.norm(lookup(ours, place(n))) for n in meta["param_order"]
                ]
                assert_close(np.array(norms), arrays[f"s{step}/{quantity}_l2"])
            params, descend_state = descend(params, descend_state, direction)
            assert_close(params, tree(arrays, f"s{step}/state/"))
            # From here on ours are the recorded ones: the variances differ by the
            # reference's correction, which training mode does not see.
            recorded = tree(arrays, f"s{step}/state/", statistics=True)
            corrected = unbiased(batch_stats, inputs["batch_stats"], meta["batch"])
            assert_close(corrected, recorded)
            batch_stats = recorded


@pytest.mark.filterwarnings("ignore:This function is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "tag",
    [
        *("global_90", "unif_80", "nm_2_4"),
        # Whose recalibration and masks the others show, too.
        *(
            pytest.param(tag, marks=pytest.mark.nightly)
            for tag in ("dense", "global_50")
        ),
    ],
)
def test_one_shot_resnet20_follows_the_authors_code(shared, tag):
    with jax.enable_x64(True):
        arrays, meta = load(shared / "golden" / "one_shot_resnet20.npz")
        params = tree(arrays, "init/")
        batch_stats = tree(arrays, "init/", statistics=True)
        facts = meta["tags"][tag]
        if tag == "dense":
            projector = cram_jax.identity()
        elif tag == "nm_2_4":
            projector = recorded_masks(
                masks_of(
                    arrays, tag + "/", facts["masked_params"], facts["shapes"], params
                )
            )
        elif tag == "unif_80":
            # It keeps k - 1 of each layer between the first and the last.
            chosen = {"/".join(place(n)): facts["nnz"][n] for n in facts["nnz"]}
            projector = cram_jax.compose(
                *(
                    cram_jax.top_k(
                        1 - kept / lookup(params, path.split("/")).size,
                        where=lambda p, _, path=path: p == path,
                    )
                    for path, kept in chosen.items()
                )
            )
        else:
            projector = cram_jax.top_k(1 - facts["total_nnz"] / facts["total_numel"])
        pruned, masks = cram_jax.compress(params, projector)
        if tag != "dense":
            recorded = masks_of(
                arrays, tag + "/", facts["masked_params"], facts["shapes"], params
            )
            jax.tree.map(np.testing.assert_array_equal, masks, recorded)
        x = images(arrays["eval_x"])
        logits, _ = forward(pruned, batch_stats, x, training=False)
        assert_close(logits, arrays[f"{tag}/logits_before_bnt"])

        calibration = np.split(arrays["calib_x"], meta["iters"])
        stats = cram_jax.recalibrate(
            partial(training_pass, pruned), batch_stats, map(images, calibration)
        )
        zero = jax.tree.map(jnp.zeros_like, stats)
        recorded = tree(arrays, f"{tag}/alt_cumulative/", statistics=True)
        ours = unbiased(stats, zero, meta["calib_bs"], momentum=0.0)
        assert_close(ours, recorded, tolerance=1e-9)
