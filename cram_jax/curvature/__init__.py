"""Pruning of trained networks by the curvature of the loss: oBERT and WoodFisher."""

from cram_jax.curvature.pruning import second_order

__all__ = ["second_order"]
