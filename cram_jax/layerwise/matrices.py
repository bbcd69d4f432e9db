"""Leaves as matrices of inputs and outputs, and the statistics of their inputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.axes import Axes, AxesLike, axes_value
from cram_jax.leaves import Leaf
from cram_jax.reshaping import gathered, placed
from cram_jax.structure.grams import InputGrams
from cram_jax.validation import holds

Grams = Mapping[str, jax.Array] | InputGrams
"""By the path of a leaf, the sum of the products of its inputs."""


def order_of(axes: Axes) -> tuple[int, ...]:
    """The axes of a leaf: stacked layers, windows and inputs, outputs."""
    return axes.stack + axes.windows + axes.inputs + axes.outputs


def to_matrices(leaf: jax.Array, axes: Axes) -> jax.Array:
    """A leaf as (layers, inputs, outputs); the window of a convolution is input.

    Args:
      leaf: an array.
      axes: of which all are stack, window, input or output.
    """
    sizes = [
        math.prod(leaf.shape[axis] for axis in part)
        for part in (axes.stack, axes.windows + axes.inputs, axes.outputs)
    ]
    return jnp.transpose(leaf, order_of(axes)).reshape(sizes)


def from_matrices(matrices: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """Undoes `to_matrices`."""
    order = order_of(axes)
    sizes = [shape[axis] for axis in order]
    return jnp.transpose(matrices.reshape(sizes), np.argsort(order).tolist())


def like_leaf(
    leaf: Leaf, weights: jax.Array, masks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Matrices in the shape of a leaf, and the weights in its dtype."""
    values = in_place(leaf, weights).astype(leaf.value.dtype)
    return values, in_place(leaf, masks)


def in_place(leaf: Leaf, matrices: jax.Array) -> jax.Array:
    """Matrices in the shape of a leaf, and where it lies."""
    array = from_matrices(matrices, jnp.shape(leaf.value), leaf.axes)
    return placed(array, leaf.value)


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The statistics of the inputs of layers.

    Attributes:
      grams: by the path of a leaf.
    """

    grams: dict[str, jax.Array]

    def obstacle(self, leaf: Leaf) -> str:
        """Why a leaf cannot be pruned by its inputs; empty if it can."""
        if leaf.path not in self.grams:
            return "nothing is known of its inputs"
        if not leaf.axes.windows + leaf.axes.inputs:
            return "it has no inputs"
        if len(order_of(leaf.axes)) < len(leaf.axes.roles):
            return "an axis of it is neither input nor output"
        if not jnp.size(leaf.value):
            return "it has no entries"
        return ""

    def matrices(self, leaf: Leaf) -> tuple[jax.Array, jax.Array]:
        """Weights, (layers, inputs, outputs), and products, (layers, inputs, inputs).

        Both in the wider of their dtypes, at least float32.
        """
        weights = to_matrices(gathered(leaf.value), leaf.axes)
        gram = gathered(jnp.asarray(self.grams[leaf.path]))
        layers, inputs, _ = weights.shape
        if jnp.size(gram) != layers * inputs**2 or jnp.shape(gram)[-1] != inputs:
            raise ValueError(
                f"grams[{leaf.path!r}] must hold {layers} x {inputs} x {inputs} "
                f"numbers for a leaf of shape {jnp.shape(leaf.value)} with "
                f"{leaf.axes}, got the shape {jnp.shape(gram)}"
            )
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(weights, gram, jnp.float32)
        gram = jnp.reshape(gram, (layers, inputs, inputs))
        return weights.astype(dtype), gram.astype(dtype)


def layer_inputs(
    grams: Any, axes: AxesLike | None
) -> tuple[LayerInputs, AxesLike | None]:
    """The products of inputs, checked, and the axes that are given or were read."""
    if isinstance(grams, InputGrams):
        axes = grams.axes if axes is None else axes
        grams = grams.grams
    if not isinstance(grams, Mapping):
        raise TypeError(
            f"grams must be what input_grams returns, or a mapping from paths to "
            f"arrays, got {type(grams).__name__}"
        )
    for path, gram in grams.items():
        shape = jnp.shape(gram)
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise ValueError(
                f"grams[{path!r}] must have the shape (inputs, inputs), perhaps after "
                f"axes of stacked layers, got {shape}"
            )
        is_traced = isinstance(gram, jax.core.Tracer)
        if not is_traced and not holds(partial(_is_finite, gram)):
            raise ValueError(f"grams[{path!r}] must be finite, got some that are not")
    return LayerInputs(dict(grams)), axes_value(axes)


def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()
