"""Pruning after training, layer by layer, from statistics of each layer's inputs."""

from cram_jax.layerwise.allocation import allocate, search
from cram_jax.layerwise.per_leaf import per_leaf
from cram_jax.layerwise.refit import refit
from cram_jax.layerwise.sparse_gpt import sparse_gpt
from cram_jax.layerwise.wanda import wanda

__all__ = ["allocate", "per_leaf", "refit", "search", "sparse_gpt", "wanda"]
