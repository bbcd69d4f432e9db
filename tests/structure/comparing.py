"""Masked and smaller networks side by side, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy_programs import evaluate

from cram_jax.structure import group_masks, small_apply, small_shapes


def some_kept(structure, seed=0, share=0.4):
    """A draw of groups that removes this share of every family."""
    rng = np.random.default_rng(seed)
    kept = np.ones(structure.size, bool)
    for family in structure.families:
        count = min(round(share * family.size), family.size - 1)
        kept[family.start + rng.permutation(family.size)[:count]] = False
    return kept


def filled(shapes, seed=0):
    """Random values for abstract arrays, so that nothing is 0 by accident."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return rng.integers(0, 2, leaf.shape).astype(leaf.dtype)
        value = 0.4 * rng.normal(size=leaf.shape)
        is_variance = "var" in jax.tree_util.keystr(path)
        return np.abs(value) + 0.5 if is_variance else value

    return jax.tree_util.tree_map_with_path(fill, shapes)


def cut(structure, masks, variables):
    """What of each variable the masks keep: a reference for `shrink`."""
    small = []
    for mask, value in zip(*map(jax.tree.leaves, (masks, variables)), strict=True):
        for axis in range(value.ndim):
            others = tuple(other for other in range(value.ndim) if other != axis)
            value = np.compress(mask.any(axis=others), value, axis=axis)
        small.append(value)
    return structure.treedef.unflatten(small)


def masked(masks, variables):
    return jax.tree.map(lambda m, v: np.where(m, v, np.zeros_like(v)), masks, variables)


def abstract(variables, shapes):
    return jax.tree.map(
        lambda v, s: jax.ShapeDtypeStruct(v.shape, s.dtype), variables, shapes
    )


def relative_difference(structure, kept, variables, inputs, dtype=np.float64):
    """Of the outputs of the smaller network from those of the masked one."""
    masks = group_masks(structure, kept)
    program = structure.model.analysis.program
    wanted = evaluate(
        program, jax.tree.leaves((masked(masks, variables), inputs)), dtype
    )
    small = cut(structure, masks, variables)
    shapes = [leaf.shape for leaf in jax.tree.leaves(small)]
    assert shapes == list(small_shapes(structure, kept).values())
    replayed = jax.make_jaxpr(small_apply(structure, kept))(
        abstract(small, structure.model.variables), *structure.model.inputs
    )
    got = evaluate(replayed, jax.tree.leaves((small, inputs)), dtype)
    scale = max(1.0, *(np.abs(out).max() for out in wanted))
    return max(np.abs(a - b).max() / scale for a, b in zip(wanted, got, strict=True))
