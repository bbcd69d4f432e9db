"""The multiply-adds of single parameters, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from cram_jax.structure import multiply_adds


def grouped(groups):
    def apply(params, x):
        image = jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return image.mean((1, 2)) @ params["head"]

    return apply


def looped(params, x):
    x = jax.lax.fori_loop(0, jnp.int32(x.sum()), lambda _, h: h @ params["w"], x)
    return jax.lax.cond(x.sum() > 0, lambda h: h @ params["v"], lambda h: h, x)


MULTIPLIED = {
    # Positions of the image, times the window, inputs of a group and outputs.
    "depthwise": (
        grouped(4),
        {"kernel": (3, 3, 1, 4), "head": (4, 2)},
        (1, 8, 7, 4),
        {"kernel": (8 * 7) * (3 * 3) * 1 * 4, "head": 4 * 2},
    ),
    "two groups": (
        grouped(2),
        {"kernel": (3, 3, 2, 6), "head": (6, 2)},
        (5, 8, 7, 4),
        {"kernel": 5 * (8 * 7) * (3 * 3) * 2 * 6, "head": 5 * 6 * 2},
    ),
    "scaled": (
        lambda params, x: x @ (params["w"] * 2 / params["scale"]),
        {"w": (4, 5), "scale": (5,)},
        (3, 4),
        {"w": 3 * 4 * 5},
    ),
    "split": (
        lambda params, x: [x @ part for part in jnp.split(params["w"], [2, 4], 1)[:2]],
        {"w": (4, 5)},
        (3, 4),
        {"w": 3 * 4 * 4},
    ),
    "read in two ways": (
        lambda params, x: (params["w"][0] + x @ params["w"]) @ params["w"].T,
        {"w": (4, 5)},
        (3, 4),
        {"w": 2 * 3 * 4 * 5},
    ),
    "in a loop and a branch": (
        looped,
        {"w": (4, 4), "v": (4, 4)},
        (3, 4),
        {"w": 3 * 4 * 4, "v": 3 * 4 * 4},
    ),
    "of several parameters": (
        lambda params, x: x @ (params["w"] @ params["v"]) + x @ (params["a"] + 1),
        {"w": (4, 2), "v": (2, 4), "a": (4, 4)},
        (3, 4),
        {},
    ),
}


@pytest.mark.parametrize("name", MULTIPLIED)
def test_multiply_adds_of_kernels_that_are_grouped_or_changed_first(name):
    apply, shapes, of_inputs, counts = MULTIPLIED[name]
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    inputs = jax.ShapeDtypeStruct(of_inputs, jnp.float32)
    assert multiply_adds(apply, params, inputs) == counts
