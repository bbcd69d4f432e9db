"""What a traced model says about its parameters: axes, coupled channels; shrinking."""

from cram_jax.structure.groups import group_masks, kept_groups
from cram_jax.structure.shrink import shrink, small_shapes
from cram_jax.structure.small import small_apply
from cram_jax.structure.structure import Family, Leaf, Member, Structure
from cram_jax.structure.trace import trace_structure

__all__ = [
    "Family",
    "Leaf",
    "Member",
    "Structure",
    "group_masks",
    "kept_groups",
    "shrink",
    "small_apply",
    "small_shapes",
    "trace_structure",
]
