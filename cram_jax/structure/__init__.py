"""Reads axes and coupled channels from a traced model, and shrinks the model."""

from cram_jax.structure.channels import channels
from cram_jax.structure.check import check_apply
from cram_jax.structure.grams import InputGrams, input_grams
from cram_jax.structure.groups import group_masks, kept_groups
from cram_jax.structure.leaf_costs import multiply_adds
from cram_jax.structure.modules import small_module
from cram_jax.structure.ranking import producer_norm
from cram_jax.structure.shrink import shrink, small_shapes
from cram_jax.structure.small import small_apply
from cram_jax.structure.structure import Family, Leaf, Member, Structure
from cram_jax.structure.trace import trace_structure

__all__ = [
    "Family",
    "InputGrams",
    "Leaf",
    "Member",
    "Structure",
    "channels",
    "check_apply",
    "group_masks",
    "input_grams",
    "kept_groups",
    "multiply_adds",
    "producer_norm",
    "shrink",
    "small_apply",
    "small_module",
    "small_shapes",
    "trace_structure",
]
