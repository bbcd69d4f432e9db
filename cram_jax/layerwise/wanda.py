"""Pruning by weights and activations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from cram_jax.axes import Axes, AxesLike
from cram_jax.layerwise.matrices import (
    Grams,
    LayerInputs,
    in_place,
    layer_inputs,
)
from cram_jax.layerwise.patterns import Pattern, chooser
from cram_jax.leaves import Leaf, LeafProjector, Where, where_value
from cram_jax.projector import apply_masks
from cram_jax.validation import check_choice


def wanda(
    sparsity: Pattern,
    grams: Grams,
    *,
    scope: Literal["output", "layer"] = "output",
    where: Where | None = None,
    axes: AxesLike | None = None,
) -> "Wanda":
    r"""Keeps the weights whose products with their inputs are largest.

    The score of a weight is its magnitude times the norm of its input, over the
    examples that ``grams`` were summed over:

    .. math:: S_{ij} = |W_{ij}| \, ||X_i||_2 = |W_{ij}| \sqrt{(X^T X)_{ii}}

    Scores are compared among the weights of one output. The weights that stay do not
    change; `refit` adjusts them. Equal scores: the weight that comes first stays.

    All layers are scored by their inputs in the dense model. The paper prunes block by
    block; for that, call it with ``where`` for one block at a time, and sum the inputs
    of the remaining blocks again.

    Args:
      sparsity: share of zeros, 0 <= sparsity < 1, or (n, m): n of every m consecutive
        inputs stay.
      grams: what `cram_jax.structure.input_grams` returns, or a mapping: by the path of
        a leaf, the sum of products of its inputs. Leaves without one stay dense.
      scope: "output", or "layer" to compare all weights of a layer; not for (n, m).
      where: which leaves, see `cram_jax.prunable`.
      axes: what is known of the axes, see `cram_jax.axes_of`; by default what
        `input_grams` has read.

    Returns:
      A projector. Its masks are bool, shaped like the leaves.

    Raises:
      ValueError: the sparsity is out of range, the scope unknown or "layer" with
        (n, m), or a sum not a square of finite numbers; at use, if one does not fit its
        leaf, or no leaf has one.
      TypeError: an argument is of a wrong type.

    Example:
      The first input is ten times as large as the second:

      >>> from cram_jax.layerwise import wanda
      >>> params = {"kernel": jnp.array([[0.5], [2.0]])}
      >>> grams = {"kernel": jnp.diag(jnp.array([100.0, 1.0]))}
      >>> compress(params, wanda(0.5, grams)).params["kernel"].ravel()
      Array([0.5, 0. ], dtype=float32)

    Reference: Sun et al., A Simple and Effective Pruning Approach for Large Language
    Models, ICLR 2024, arXiv 2306.11695.
    """
    check_choice("scope", scope, ("output", "layer"))
    if scope == "layer" and isinstance(sparsity, tuple):
        raise ValueError(
            f"scope must be 'output' with (n, m), which is of every output, got "
            f"scope={scope!r} and {sparsity}"
        )
    inputs, axes = layer_inputs(grams, axes)
    return Wanda(inputs, chooser(sparsity), sparsity, scope, where_value(where), axes)


@dataclass(frozen=True, eq=False, repr=False)
class Wanda(LeafProjector):
    """See `wanda`."""

    inputs: LayerInputs
    chooser: LeafProjector
    sparsity: Pattern
    scope: Literal["output", "layer"]
    where: Where | None
    axes: AxesLike | None

    def __repr__(self) -> str:
        return f"wanda({self.sparsity}, ...)"

    def obstacle(self, leaf: Leaf) -> str:
        """Says so if nothing is known about its inputs, or m does not divide them."""
        return self.inputs.obstacle(leaf) or self.chooser.obstacle(leaf)

    def project_leaves(
        self, leaves: Sequence[Leaf]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Keeps the largest scores."""
        by_output = self.scope == "output" and not isinstance(self.sparsity, tuple)
        axes = Axes("stack", "input", "stack" if by_output else "output")
        scores = [Leaf(leaf.path, self._scores(leaf), axes) for leaf in leaves]
        pairs = []
        for leaf, (_, chosen) in zip(
            leaves, self.chooser.project_leaves(scores), strict=True
        ):
            mask = in_place(leaf, chosen)
            pairs.append((apply_masks(mask, leaf.value), mask))
        return pairs

    def _scores(self, leaf: Leaf) -> jax.Array:
        weights, gram = self.inputs.matrices(leaf)
        norms = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))
        return jnp.abs(weights) * norms[:, :, None]
