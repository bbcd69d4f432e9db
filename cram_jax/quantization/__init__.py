"""Projectors that round weights to what the formats of engines hold, bit for bit."""

from cram_jax.quantization.integers import fake_quant
from cram_jax.quantization.microscaling import mxfp4, nvfp4
from cram_jax.quantization.nesting import nested

__all__ = ["fake_quant", "mxfp4", "nested", "nvfp4"]
