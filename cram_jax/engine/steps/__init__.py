"""The steps of every operation of a packed graph."""

from collections.abc import Callable
from typing import Any

from cram_jax.engine.fusion import Lookup
from cram_jax.engine.graph import Node
from cram_jax.engine.model import IntegerAttention, PackedProduct
from cram_jax.engine.operations import (
    Add,
    AddPositions,
    Affine,
    Attention,
    AvgPool,
    Flatten,
    Gelu,
    Input,
    LayerNorm,
    MaxPool,
    Mean,
    Relu,
    Softmax,
    SpaceToDepth,
    Tanh,
    Token,
)
from cram_jax.engine.steps.attention import emit_attention, emit_integer_attention
from cram_jax.engine.steps.columns import (
    emit_layer_norm,
    emit_pointwise,
    emit_softmax,
)
from cram_jax.engine.steps.inputs import emit_input, emit_lookup, emit_positions
from cram_jax.engine.steps.positions import (
    emit_flatten,
    emit_mean,
    emit_pool,
    emit_token,
)
from cram_jax.engine.steps.products import emit_product

EMITTERS: dict[type, Callable[[Any, Node], None]] = {
    Input: emit_input,
    SpaceToDepth: emit_input,
    PackedProduct: emit_product,
    Lookup: emit_lookup,
    AddPositions: emit_positions,
    LayerNorm: emit_layer_norm,
    Softmax: emit_softmax,
    Attention: emit_attention,
    IntegerAttention: emit_integer_attention,
    MaxPool: emit_pool,
    AvgPool: emit_pool,
    Mean: emit_mean,
    Flatten: emit_flatten,
    Token: emit_token,
    **dict.fromkeys((Add, Affine, Relu, Gelu, Tanh), emit_pointwise),
}
"""For every operation, the function that adds its steps to a `Builder`."""
