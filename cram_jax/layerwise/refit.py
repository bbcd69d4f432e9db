"""The best weights for given masks."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cram_jax.axes import AxesLike
from cram_jax.layerwise.hessians import hessian
from cram_jax.layerwise.matrices import (
    Grams,
    LayerInputs,
    layer_inputs,
    like_leaf,
    to_matrices,
)
from cram_jax.leaves import Leaf, Where, described, prunable, where_value
from cram_jax.projector import (
    Params,
    Projection,
    Projector,
    check_projector,
    safe_denominator,
)
from cram_jax.reshaping import gathered
from cram_jax.scaling import power_of_two
from cram_jax.validation import check_positive


def refit(
    projector: Projector,
    grams: Grams,
    *,
    damping: float = 0.01,
    where: Where | None = None,
    axes: AxesLike | None = None,
) -> "Refit":
    r"""Prunes as a projector does, then gives the weights that stay their best values.

    Of all weights :math:`\hat W` with the masks of the projector, it finds those whose
    layer is closest to the dense one, in squared error:

    .. math::
        \min_{\hat W} tr((\hat W - W)^T H (\hat W - W)), \quad H = X^T X + \lambda I

    For an output that keeps the inputs P and loses the inputs Q that is
    :math:`\hat w_P = w_P + H_{PP}^{-1} H_{PQ} w_Q`. All outputs of a layer are solved
    together, by conjugate gradients that start from the projector's weights, so that no
    step is worse. It is the optimum that AdaPrune's gradient descent approaches.

    The result depends only on the dense weights and the masks, so rounding by the inner
    projector is lost: round afterwards, ``compose(refit(...), fake_quant(4))``, or use
    `sparse_gpt`, which prunes and rounds together.

    Args:
      projector: what prunes, such as `cram_jax.top_k`, or `wanda`, `sparse_gpt`.
      grams: what `cram_jax.structure.input_grams` returns, or a mapping: by the path of
        a leaf, the sum of products of its inputs. Leaves without one stay as the
        projector leaves them.
      damping: :math:`\lambda` as a share of the mean of the diagonal, above 0.
      where: which leaves, see `cram_jax.prunable`.
      axes: what is known of the axes, see `cram_jax.axes_of`; by default what
        `input_grams` has read.

    Returns:
      A projector with the masks of the other.

    Raises:
      ValueError: the damping is out of range, or a sum not a square of finite numbers;
        at use, if one does not fit its leaf, or no leaf has one.
      TypeError: an argument is of a wrong type.

    Example:
      The inputs are equal, so the one that stays can do the work of both:

      >>> from cram_jax.layerwise import refit
      >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
      >>> grams = {"kernel": jnp.ones((2, 2))}
      >>> compress(params, refit(top_k(0.5), grams)).params["kernel"].ravel().round(2)
      Array([0.  , 2.99], dtype=float32)

    References:
      Hubara et al., Accelerated Sparse Neural Training (AdaPrune), NeurIPS 2021,
      arXiv 2102.08124; Frantar and Alistarh, SPDY, ICML 2022, arXiv 2201.13096.
    """
    check_projector("projector", projector)
    check_positive("damping", damping)
    inputs, axes = layer_inputs(grams, axes)
    return Refit(inputs, projector, damping, where_value(where), axes)


@dataclass(frozen=True, eq=False, repr=False)
class Refit(Projector):
    """See `refit`."""

    inputs: LayerInputs
    projector: Projector
    damping: float
    where: Where | None
    axes: AxesLike | None

    def __repr__(self) -> str:
        return f"refit({self.projector!r}, ...)"

    @property
    def only_masks(self) -> bool:
        """False: it changes what it keeps."""
        return False

    @property
    def is_scheduled(self) -> bool:
        """Whether the other projector is."""
        return self.projector.is_scheduled

    def changes(self, params: Params) -> list[bool]:
        """The leaves that the other projector changes, and those it solves for."""
        refitted = self._refitted(params)
        return [
            is_pruned or index in refitted
            for index, is_pruned in enumerate(self.projector.changes(params))
        ]

    def init(self, params: Params) -> Any:
        """The state of the other projector."""
        self._refitted(params)
        return self.projector.init(params)

    def notes(self, params: Params) -> list[str]:
        """The notes of the other projector."""
        return self.projector.notes(params)

    def project(
        self, params: Params, state: Any, key: jax.Array | None
    ) -> tuple[Projection, Any]:
        """Prunes, then solves for the weights that stay."""
        (pruned, masks), state = self.projector.project(params, state, key)
        values, kept = jax.tree.leaves(pruned), jax.tree.leaves(masks)
        for i, leaf in self._refitted(params).items():
            # NumPy's float64 may not be a dtype that jax has enabled.
            leaf = leaf._replace(value=jnp.asarray(leaf.value))
            weights, gram = self.inputs.matrices(leaf)
            mask = to_matrices(gathered(kept[i]), leaf.axes)
            start = to_matrices(gathered(values[i]), leaf.axes).astype(weights.dtype)
            solved = _solve(weights, mask, start, gram, self.damping)
            values[i], _ = like_leaf(leaf, solved, mask)
        structure: Any = jax.tree.structure(params)
        return Projection(structure.unflatten(values), masks), state

    def _refitted(self, params: Params) -> dict[int, Leaf]:
        """The leaves to solve for, by their number."""
        leaves = described(params, self.axes)
        chosen = prunable(params, self.where, self.axes)
        reasons = {
            leaf.path: self.inputs.obstacle(leaf)
            for leaf, is_chosen in zip(leaves, chosen, strict=True)
            if is_chosen
        }
        if all(reasons.values()):
            path, reason = next(iter(reasons.items()))
            raise ValueError(f"{self!r} fits no leaf: {path!r}: {reason}")
        return {
            i: leaf for i, leaf in enumerate(leaves) if reasons.get(leaf.path) == ""
        }


class _Search(NamedTuple):
    """State of conjugate gradients, for every output of a layer.

    Attributes:
      weights: so far.
      residual: minus half the gradient of the error.
      direction: of the next step.
      size: of the residual, in the norm of the preconditioner; (1, outputs).
      step: how many have been made.
    """

    weights: jax.Array
    residual: jax.Array
    direction: jax.Array
    size: jax.Array
    step: jax.Array


@jax.jit
def _solve(
    weights: jax.Array,
    masks: jax.Array,
    start: jax.Array,
    gram: jax.Array,
    damping: float,
) -> jax.Array:
    """The best weights of stacked layers, (layers, inputs, outputs)."""

    def solve(layer: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _solve_layer(*layer, damping)

    return jax.lax.map(solve, (weights, masks, start, gram))


def _solve_layer(
    weights: jax.Array,
    masks: jax.Array,
    start: jax.Array,
    gram: jax.Array,
    damping: float,
) -> jax.Array:
    # Each output relative to a power of two, so that squares stay in range.
    unit = power_of_two(jnp.max(jnp.abs(weights), axis=0, keepdims=True, initial=0))
    weights, start = (leaf * (1 / unit) for leaf in (weights, start))
    start = jnp.where(masks, start, 0)
    matrix = hessian(gram, damping)
    inverse = 1 / jnp.diagonal(matrix)[:, None]
    tolerance = (8 * jnp.finfo(matrix.dtype).eps) ** 2

    def product(columns: jax.Array) -> jax.Array:
        full = jnp.matmul(matrix, columns, precision="highest")
        return jnp.where(masks, full, 0)

    def norm(residual: jax.Array) -> jax.Array:
        return jnp.sum(inverse * residual**2, axis=0, keepdims=True)

    goal = tolerance * norm(product(weights))

    def cond(search: _Search) -> jax.Array:
        return jnp.any(search.size > goal) & (search.step < 2 * len(matrix))

    def body(search: _Search) -> _Search:
        image = product(search.direction)
        curvature = jnp.sum(search.direction * image, axis=0, keepdims=True)
        moving = (search.size > goal) & (curvature > 0)
        length = jnp.where(moving, search.size / safe_denominator(curvature), 0)
        residual = search.residual - length * image
        size = norm(residual)
        turn = size / safe_denominator(search.size)
        return _Search(
            search.weights + length * search.direction,
            residual,
            inverse * residual + turn * search.direction,
            size,
            search.step + 1,
        )

    residual = product(weights - start)
    first = _Search(
        start, residual, inverse * residual, norm(residual), jnp.zeros([], int)
    )
    return jax.lax.while_loop(cond, body, first).weights * unit
