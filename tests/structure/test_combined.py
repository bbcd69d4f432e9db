"""Weights that are combined before activations meet them keep their roles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure.comparing import filled, relative_difference, some_kept

from cram_jax import compress, n_m
from cram_jax.structure import trace_structure


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


X = array(5, 6)
OUT = {"o": array(8, 3)}
READ = {"o": ("input", "output")}
KERNEL = ("input", "output")


def hidden(kernel):
    """Two dense layers, the first with a kernel that is computed from others."""
    return lambda p, x: jax.nn.relu(x @ kernel(p)) @ p["o"]


def spectral_norm(p):
    row = p["u"] @ p["w"].T
    row = row / jnp.linalg.norm(row)
    return p["w"] / jnp.sum(row @ p["w"] @ p["u"].T)


def weight_norm(p):
    return p["g"] * p["w"] / jnp.sqrt(jnp.sum(p["w"] ** 2, axis=0) + 1.0)


def attention(stack):
    """Self-attention of two heads of four units, from three kernels used as one."""

    def apply(p, x):
        q, k, v = stack(p, x)
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
        mixed = jnp.einsum("hts,shd->thd", weights, v)
        return mixed.reshape(len(x), 8) @ p["o"]

    return apply


def joined(p, x):
    kernel = jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
    return jnp.moveaxis((x @ kernel).reshape(len(x), 3, 2, 4), 1, 0)


def stacked(p, x):
    kernels = jnp.stack([p["q"], p["k"], p["v"]])
    return jnp.einsum("td,nde->nte", x, kernels).reshape(3, len(x), 2, 4)


HEADS = {name: array(6, 8) for name in "qkv"}
COMBINED = {
    "a low-rank update": (
        hidden(lambda p: p["w"] + p["a"] @ p["b"]),
        {"w": array(6, 8), "a": array(6, 2), "b": array(2, 8)},
        {"w": KERNEL, "a": KERNEL, "b": KERNEL},
        10,
    ),
    "a difference": (
        hidden(lambda p: p["w"] + 0.5 * p["d"]),
        {"w": array(6, 8), "d": array(6, 8)},
        {"w": KERNEL, "d": KERNEL},
        8,
    ),
    "outputs side by side": (
        hidden(lambda p: jnp.concatenate([p["q"], p["k"]], axis=1)),
        {"q": array(6, 5), "k": array(6, 3)},
        {"q": KERNEL, "k": KERNEL},
        8,
    ),
    "inputs side by side": (
        hidden(lambda p: jnp.concatenate([p["q"], p["k"]], axis=0)),
        {"q": array(4, 8), "k": array(2, 8)},
        {"q": KERNEL, "k": KERNEL},
        8,
    ),
    "weight norm": (
        hidden(weight_norm),
        {"w": array(6, 8), "g": array(8)},
        {"w": KERNEL, "g": ("other",)},
        8,
    ),
    "spectral norm": (
        hidden(spectral_norm),
        {"w": array(6, 8), "u": array(1, 8)},
        {"w": KERNEL, "u": (None, None)},
        8,
    ),
    "a scale for each input": (
        hidden(lambda p: p["s"][:, None] * p["w"]),
        {"w": array(6, 8), "s": array(6)},
        {"w": KERNEL, "s": ("other",)},
        8,
    ),
    "a gate for each weight": (
        hidden(lambda p: jax.nn.sigmoid(p["m"]) * p["w"]),
        {"w": array(6, 8), "m": array(6, 8)},
        {"w": KERNEL, "m": KERNEL},
        8,
    ),
    "heads joined, then split by a reshape": (
        attention(joined),
        HEADS,
        dict.fromkeys("qkv", KERNEL),
        6,
    ),
    "heads stacked": (attention(stacked), HEADS, dict.fromkeys("qkv", KERNEL), 6),
}


@pytest.mark.parametrize("name", COMBINED)
def test_combined_weights_are_told_and_shrink(name):
    apply, weights, roles, groups = COMBINED[name]
    structure = trace_structure(apply, {**weights, **OUT}, X)
    assert {leaf.path: leaf.roles for leaf in structure.leaves} == {**roles, **READ}
    assert structure.size == groups
    values = filled((structure.model.variables, structure.model.inputs))
    kept = some_kept(structure)
    assert relative_difference(structure, kept, *values) < 1e-12


def test_a_kernel_of_one_input_is_a_kernel():
    shapes = {"w": array(1, 8), "b": array(8), **OUT}
    structure = trace_structure(
        lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["o"], shapes, array(5, 1)
    )
    roles = {leaf.path: leaf.roles for leaf in structure.leaves}
    assert roles == {"w": KERNEL, "b": ("other",), **READ}


def test_projectors_prune_all_weights_that_are_combined():
    """Each along its inputs: two of four of the update's factor of four rows."""
    apply = hidden(lambda p: p["w"] + p["a"] @ p["b"])
    shapes = {"w": array(8, 8), "a": array(8, 4), "b": array(4, 8), **OUT}
    structure = trace_structure(apply, shapes, array(5, 8))
    params = jax.tree.map(jnp.asarray, filled(shapes))
    params, _ = compress(params, n_m(2, 4, axes=structure.axes))
    for leaf in jax.tree.leaves(params):
        groups = np.reshape(leaf != 0, (-1, 4, leaf.shape[1]))
        assert (groups.sum(axis=1) == 2).all()
