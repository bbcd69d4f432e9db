"""Models of four frameworks, abstract: nothing is initialised or compiled.

Each function returns ``(apply, variables, *inputs)`` of shapes.
"""

from structure.models.equinox_models import (
    attention_equinox,
    cnn_equinox,
    gru_equinox,
    lstm_equinox,
    mlp_equinox,
)
from structure.models.functions import (
    heads_by_vmap,
    mixture_of_experts,
    scanned_functions,
)
from structure.models.haiku_models import (
    attention_haiku,
    lstm_haiku,
    resnet_haiku,
)
from structure.models.linen_models import (
    attention_linen,
    cnn_linen,
    convnext_linen,
    lstm_linen,
    scan_linen,
)
from structure.models.nnx_images import (
    bottleneck_resnet_nnx,
    densenet_nnx,
    mobilenet_nnx,
    resnet_nnx,
    shufflenet_nnx,
    unet_nnx,
    vgg_nnx,
)
from structure.models.nnx_sequences import (
    attention_nnx,
    bert_nnx,
    decoder_nnx,
    fused_attention_nnx,
    heads_by_reshape_nnx,
    scan_nnx,
    units_by_reshape_nnx,
    vit_nnx,
)
from structure.models.shapes import array as array

RESHAPE = "reshape"
LINEN = "ScopeParamShapeError"
HAIKU = "retrieved shape"

# What a trace finds in each model: families, groups, and a word of the reason why the
# model's own function may not be called with smaller arrays; None if it may.
EXPECTED = {
    resnet_nnx: (6, 72, None),
    bottleneck_resnet_nnx: (9, 184, None),
    vgg_nnx: (3, 44, None),
    mobilenet_nnx: (6, 80, "feature_group_count"),
    densenet_nnx: (4, 26, None),
    unet_nnx: (6, 48, RESHAPE),
    shufflenet_nnx: (2, 15, "feature_group_count"),
    attention_nnx: (4, 36, RESHAPE),
    heads_by_reshape_nnx: (4, 36, RESHAPE),
    units_by_reshape_nnx: (4, 36, RESHAPE),
    fused_attention_nnx: (3, 32, RESHAPE),
    vit_nnx: (7, 68, RESHAPE),
    bert_nnx: (9, 168, RESHAPE),
    decoder_nnx: (6, 46, RESHAPE),
    scan_nnx: (1, 24, None),
    cnn_linen: (3, 36, LINEN),
    attention_linen: (4, 36, LINEN),
    scan_linen: (1, 24, LINEN),
    convnext_linen: (2, 40, LINEN),
    lstm_linen: (1, 12, LINEN),
    mlp_equinox: (3, 48, None),
    cnn_equinox: (3, 24, None),
    attention_equinox: (3, 12, RESHAPE),
    gru_equinox: (1, 12, "contracting dimensions"),
    lstm_equinox: (1, 12, "contracting dimensions"),
    resnet_haiku: (9, 160, HAIKU),
    attention_haiku: (4, 36, HAIKU),
    lstm_haiku: (1, 12, HAIKU),
    scanned_functions: (2, 40, None),
    heads_by_vmap: (2, 9, None),
    mixture_of_experts: (1, 12, None),
}
