"""Names that docstring examples take for granted."""

import jax
import jax.numpy as jnp
import optax
import pytest

import cram_jax


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, cram_jax=cram_jax)
    doctest_namespace.update({n: getattr(cram_jax, n) for n in cram_jax.__all__})
