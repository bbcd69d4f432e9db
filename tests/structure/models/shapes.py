"""Shapes that the models share; nothing is initialised."""

import jax
import jax.numpy as jnp


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


KEY = jax.eval_shape(lambda: jax.random.key(0))
IMAGES = array(2, 8, 8, 3)
TOKENS = array(2, 5, 16)
