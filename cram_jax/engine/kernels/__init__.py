"""The kernels: each a frozen value whose options choose its code."""

from cram_jax.engine.kernels.attention import Attend
from cram_jax.engine.kernels.base import KernelSpec
from cram_jax.engine.kernels.columns import LayerNormalise, Pointwise, SoftmaxColumns
from cram_jax.engine.kernels.integer_attention import (
    AttendBytes,
    SignKeys,
    TransposeValues,
)
from cram_jax.engine.kernels.moves import Embed, Gather, LoadInput, Quantise
from cram_jax.engine.kernels.pooling import MeanOfImages, Pool
from cram_jax.engine.kernels.sparse import UNIT, SparseProduct

__all__ = [
    "UNIT",
    "Attend",
    "AttendBytes",
    "Embed",
    "Gather",
    "KernelSpec",
    "LayerNormalise",
    "LoadInput",
    "MeanOfImages",
    "Pointwise",
    "Pool",
    "Quantise",
    "SignKeys",
    "SoftmaxColumns",
    "SparseProduct",
    "TransposeValues",
]
