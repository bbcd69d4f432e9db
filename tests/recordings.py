"""Shared by both comparisons with the authors' recorded runs."""

import jax
import jax.numpy as jnp

import cram_jax


def recorded_masks(masks):
    """A projector that prunes by masks of a recording."""

    def project(params, key):
        del key
        pruned = jax.tree.map(lambda m, p: jnp.where(m, p, 0), masks, params)
        return cram_jax.Projection(pruned, masks)

    return cram_jax.stateless(project, "recorded masks")
