"""Compression-aware training for optax.

CrAM, the Compression-Aware Minimizer (Peste et al., ICLR 2023, arXiv 2207.14200),
trains one dense model that can be compressed in one shot, after training, to many
targets.
"""

# Update rules: first members of an optax chain.
from cram_jax.transforms import CramState, cram, cram_plus
from cram_jax.baselines import compressed_sam, sam
from cram_jax.losses import loss_scaled, subsampled
from cram_jax.pulling import PulledState, pulled

# Training under masks, around an optimiser.
from cram_jax.masking import MaskRule, PrunedState, Step, pruned, renew_by

# Inside the loss.
from cram_jax.reparameterizations import (
    gated,
    open_share,
    scored,
    scores_like,
    soft_threshold,
    straight_through,
    thresholded,
)

# Projectors: what the model is trained for, and compressed with.
from cram_jax.magnitude import n_m, top_k
from cram_jax.quantization import fake_quant, mxfp4, nested, nvfp4
from cram_jax.combinators import compose, identity, one_of
from cram_jax.caching import CachedState, cached
from cram_jax.scheduling import ScheduledState, scheduled
from cram_jax.projector import Projection, Projector, stateless

# After training.
from cram_jax.compress import KeepPrunedState, compress, keep_pruned
from cram_jax.curvature import second_order
from cram_jax.batch_norm import recalibrate
from cram_jax.report import LeafSparsity, SparsityReport, sparsity_report

# What projectors are built on.
from cram_jax.axes import Axes, axes_of, stacked
from cram_jax.leaves import Where, all_but, matching, prunable
from cram_jax.selection import keep_largest

__version__ = "0.2.0"

__all__ = [
    "Axes",
    "CachedState",
    "CramState",
    "KeepPrunedState",
    "LeafSparsity",
    "MaskRule",
    "Projection",
    "Projector",
    "PrunedState",
    "PulledState",
    "ScheduledState",
    "SparsityReport",
    "Step",
    "Where",
    "all_but",
    "axes_of",
    "cached",
    "compose",
    "compress",
    "compressed_sam",
    "cram",
    "cram_plus",
    "fake_quant",
    "gated",
    "identity",
    "keep_largest",
    "keep_pruned",
    "loss_scaled",
    "matching",
    "mxfp4",
    "n_m",
    "nested",
    "nvfp4",
    "one_of",
    "open_share",
    "prunable",
    "pruned",
    "pulled",
    "recalibrate",
    "renew_by",
    "sam",
    "scheduled",
    "scored",
    "scores_like",
    "second_order",
    "soft_threshold",
    "sparsity_report",
    "stacked",
    "stateless",
    "straight_through",
    "subsampled",
    "thresholded",
    "top_k",
]
