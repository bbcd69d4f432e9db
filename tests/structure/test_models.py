"""Models of NNX, Linen, Equinox, Haiku and of plain functions."""

import functools

import numpy as np
import pytest
from structure import models
from structure.comparing import filled, relative_difference, some_kept

from cram_jax.structure import check_apply, trace_structure


@functools.cache
def traced(model):
    apply, variables, *inputs = model()
    return trace_structure(apply, variables, *inputs)


@pytest.mark.parametrize("model", models.EXPECTED, ids=lambda model: model.__name__)
def test_the_smaller_network_is_the_masked_one(model):
    structure = traced(model)
    families, groups, _ = models.EXPECTED[model]
    assert (len(structure.families), structure.size) == (families, groups)
    kept = some_kept(structure)
    values = filled((structure.model.variables, structure.model.inputs))
    assert relative_difference(structure, kept, *values) < 1e-12
    assert relative_difference(structure, kept, *values, dtype=np.float32) < 1e-5


@pytest.mark.parametrize("model", models.EXPECTED, ids=lambda model: model.__name__)
def test_check_apply_knows_whether_the_models_own_function_will_do(model):
    structure = traced(model)
    reason = check_apply(structure, some_kept(structure))
    expected = models.EXPECTED[model][-1]
    assert (reason is None) if expected is None else (expected in reason)


def test_one_of_ten_inner_channels_is_frozen():
    """By a layer norm of two passes, and a router."""
    counts = {model: traced(model).frozen_channels for model in models.EXPECTED}
    assert {model: count for model, count in counts.items() if count[0]} == {
        models.vit_nnx: (80, 224),
        models.bert_nnx: (192, 512),
        models.mixture_of_experts: (8, 20),
    }
    assert sum(total for _, total in counts.values()) == 2915


def test_every_axis_of_a_transformer_is_told():
    structure = traced(models.decoder_nnx)
    roles = {leaf.path: leaf.roles for leaf in structure.leaves}
    assert roles["embed/embedding"] == ("lookup", "output")
    assert roles["query/kernel"] == ("input", "output")
    assert roles["norm1/scale"] == ("other",)
    structure = traced(models.attention_linen)
    roles = {leaf.path: leaf.roles for leaf in structure.leaves}
    attention = "params/MultiHeadDotProductAttention_0"
    assert roles[f"{attention}/query/kernel"] == ("input", "output", "output")
    assert roles[f"{attention}/out/kernel"] == ("input", "input", "output")


def test_convolutions_stacks_and_layouts_are_told():
    roles = {leaf.path: leaf.roles for leaf in traced(models.cnn_equinox).leaves}
    assert roles["layers/0/weight"] == ("output", "input", "window", "window")
    assert roles["layers/6/weight"] == ("output", "input")
    roles = {leaf.path: leaf.roles for leaf in traced(models.mobilenet_nnx).leaves}
    assert roles["block1/depthwise/kernel"] == ("window", "window", "input", "output")
    assert roles["block1/norm1/scale"] == ("other",)
    roles = {leaf.path: leaf.roles for leaf in traced(models.scanned_functions).leaves}
    assert roles["layers/up"] == ("stack", "input", "output")
    assert roles["layers/bias"] == ("stack", "other")


def test_routing_is_frozen_with_the_operation_as_its_reason():
    structure = traced(models.mixture_of_experts)
    assert any("top_k" in reason for reason in structure.frozen["router[1]"])
    assert structure.families[0].names == ("down[1]", "up[2]")


def test_heads_and_units_are_groups_of_their_own():
    families = {
        family.names: family.size for family in traced(models.decoder_nnx).families
    }
    shared_heads = next(names for names in families if "value/kernel[1.0]" in names)
    assert families[shared_heads] == 2
    assert "query/kernel[1.0]" in shared_heads
    units = next(names for names in families if "value/kernel[1.1]" in names)
    assert families[units] == 4


def test_axes_serve_the_projectors_of_the_core():
    from cram_jax import axes_of

    structure = traced(models.mlp_equinox)
    variables = structure.model.variables
    axes = axes_of(variables, structure.axes)
    assert [a.inputs for a in axes if a.is_matrix] == [(1,)] * 4
    assert not any(a.assumed for a in axes)
