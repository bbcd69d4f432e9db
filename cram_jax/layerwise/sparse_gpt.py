"""Pruning input by input, with the error passed on to later inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cram_jax.axes import Axes, AxesLike
from cram_jax.layerwise.hessians import hessian
from cram_jax.layerwise.matrices import Grams, LayerInputs, layer_inputs, like_leaf
from cram_jax.layerwise.patterns import Pattern, chooser
from cram_jax.leaves import Leaf, LeafProjector, Where, where_value
from cram_jax.magnitude import n_m
from cram_jax.quantization.integers import Grid, ends, grid_between
from cram_jax.selection import keep_largest
from cram_jax.sparsity import kept_count
from cram_jax.validation import check_integer, check_positive


def sparse_gpt(
    sparsity: Pattern,
    grams: Grams,
    *,
    bits: int | None = None,
    block: int = 128,
    damping: float = 0.01,
    where: Where | None = None,
    axes: AxesLike | None = None,
) -> "SparseGPT":
    r"""Prunes one input after the other, and lets later ones compensate.

    With the sum :math:`X^T X` of products of a layer's inputs,
    :math:`H = X^T X + \lambda I` and :math:`U` the upper Cholesky factor of
    :math:`H^{-1}`, inputs are taken in their order. Of each block of inputs the weights
    with the smallest :math:`w_{ij}^2 / U_{ii}^2` are removed, over all outputs
    together; with (n, m) they are chosen at every m-th input, from the weights at that
    point. Removing or rounding :math:`w_i` to :math:`q_i` moves the later inputs:

    .. math:: W_{k} \leftarrow W_{k} - U_{ik} (w_i - q_i) / U_{ii}, \quad k > i

    Exactly as many weights of each block are removed as the sparsity says. Equal
    ratios: the weight that comes first stays. Inputs that are always zero lose their
    weights. `refit` finds better weights for the same masks, unless they are rounded.

    Cost of a layer: inputs**3 for the factor and inputs**2 times outputs for the rest,
    in float32, or float64 for float64 parameters or sums.

    Args:
      sparsity: share of zeros, 0 <= sparsity < 1, or (n, m): n of every m consecutive
        inputs stay.
      grams: what `cram_jax.structure.input_grams` returns, or a mapping: by the path of
        a leaf, the sum of products of its inputs. Leaves without one stay dense.
      bits: width of the integers to round the weights to, as `cram_jax.fake_quant`
        does by default; the scale of an output is that of its dense weights. None: the
        weights are not rounded. With a sparsity of 0 this is GPTQ.
      block: how many inputs have their masks chosen together. With (n, m) it matters
        only for speed.
      damping: :math:`\lambda` as a share of the mean of the diagonal, above 0.
      where: which leaves, see `cram_jax.prunable`.
      axes: what is known of the axes, see `cram_jax.axes_of`; by default what
        `input_grams` has read.

    Returns:
      A projector. Its masks are bool, shaped like the leaves.

    Raises:
      ValueError: a number is out of range, or a sum not a square of finite numbers; at
        use, if one does not fit its leaf, or no leaf has one, or, outside of ``jit``,
        the damping is too small to invert it.
      TypeError: an argument is of a wrong type.

    Example:
      The inputs are equal, so the second can do the work of both:

      >>> from cram_jax.layerwise import sparse_gpt
      >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
      >>> grams = {"kernel": jnp.ones((2, 2))}
      >>> compress(params, sparse_gpt(0.5, grams)).params["kernel"].ravel().round(2)
      Array([0.  , 2.99], dtype=float32)

    Reference: Frantar and Alistarh, SparseGPT, ICML 2023, arXiv 2301.00774.
    """
    choose = chooser(sparsity)
    if bits is not None:
        check_integer("bits", bits, 2, 16)
    check_integer("block", block, 1)
    check_positive("damping", damping)
    inputs, axes = layer_inputs(grams, axes)
    where = where_value(where)
    return SparseGPT(inputs, choose, sparsity, bits, block, damping, where, axes)


@dataclass(frozen=True, eq=False, repr=False)
class SparseGPT(LeafProjector):
    """See `sparse_gpt`."""

    inputs: LayerInputs
    chooser: LeafProjector
    sparsity: Pattern
    bits: int | None
    block: int
    damping: float
    where: Where | None
    axes: AxesLike | None

    def __repr__(self) -> str:
        bits = "" if self.bits is None else f", bits={self.bits}"
        return f"sparse_gpt({self.sparsity}, ...{bits})"

    @property
    def only_masks(self) -> bool:
        """False: it changes what it keeps."""
        return False

    def obstacle(self, leaf: Leaf) -> str:
        """Says so if nothing is known about its inputs, or m does not divide them."""
        return self.inputs.obstacle(leaf) or self.chooser.obstacle(leaf)

    def project_leaves(
        self, leaves: Sequence[Leaf]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Prunes each leaf."""
        return [self._project(leaf) for leaf in leaves]

    def _project(self, leaf: Leaf) -> tuple[jax.Array, jax.Array]:
        weights, gram = self.inputs.matrices(leaf)
        _, inputs, outputs = weights.shape
        block = min(self.block, inputs)
        group, share = None, self.sparsity
        if isinstance(share, tuple):
            group, share = share, 0.0
            block = max(block // group[1], 1) * group[1]  # groups lie within blocks
        sizes = [min(block, inputs - i) * outputs for i in range(0, inputs, block)]
        pruned, masks = _prune(
            weights,
            gram,
            self.damping,
            jnp.asarray([kept_count(size, share) for size in sizes]),
            options=_Options(block, group, self.bits),
        )
        is_known = not isinstance(pruned, jax.core.Tracer)
        if is_known and jnp.isnan(pruned).any() and not jnp.isnan(weights).any():
            raise ValueError(
                f"damping={self.damping} is too small for {leaf.path!r}, whose inputs "
                f"depend on each other"
            )
        return like_leaf(leaf, pruned, masks)


class _Options(NamedTuple):
    """What the program depends on.

    Attributes:
      block: how many inputs it takes at a time.
      group: (n, m), or None for a share of each block.
      bits: to round to; None: the weights are not rounded.
    """

    block: int
    group: tuple[int, int] | None
    bits: int | None


@partial(jax.jit, static_argnames="options")
def _prune(
    weights: jax.Array,
    gram: jax.Array,
    damping: float,
    counts: jax.Array,
    *,
    options: _Options,
) -> tuple[jax.Array, jax.Array]:
    """Prunes stacked layers; keeps ``counts`` of each block."""

    def prune(layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _prune_layer(*layer, damping, counts, options)

    return jax.lax.map(prune, (weights, gram))


def _prune_layer(
    weights: jax.Array,
    gram: jax.Array,
    damping: float,
    counts: jax.Array,
    options: _Options,
) -> tuple[jax.Array, jax.Array]:
    inputs, width = len(weights), options.block
    total = width * len(counts)  # the last block is padded with zeros
    grid = None
    if options.bits is not None:
        grid = grid_between(*ends(weights, (0,)), bits=options.bits)
    weights = jnp.where(jnp.diagonal(gram)[:, None] == 0, 0, weights)
    weights = jnp.pad(weights, ((0, total - inputs), (0, 0)))
    factor = jnp.eye(total, dtype=weights.dtype)
    factor = factor.at[:inputs, :inputs].set(_inverse_factor(hessian(gram, damping)))

    def prune_next(number: jax.Array, carry: _Pruned) -> _Pruned:
        first = number * width
        rows = jax.lax.dynamic_slice_in_dim(factor, first, width)
        block, errors = _prune_block(
            jax.lax.dynamic_slice_in_dim(carry.weights, first, width),
            jax.lax.dynamic_slice_in_dim(rows, first, width, axis=1),
            counts[number],
            grid,
            options,
        )
        later = jnp.where(jnp.arange(total) >= first + width, rows, 0)
        moved = carry.weights - jnp.matmul(later.T, errors, precision="highest")
        after = _Pruned(moved, carry.masks)
        return jax.tree.map(
            partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0),
            after,
            block,
        )

    start = _Pruned(weights, jnp.zeros_like(weights, dtype=bool))
    pruned = jax.lax.fori_loop(0, len(counts), prune_next, start)
    return pruned.weights[:inputs], pruned.masks[:inputs]


class _Pruned(NamedTuple):
    weights: jax.Array
    masks: jax.Array


def _prune_block(
    weights: jax.Array,
    factor: jax.Array,
    kept: jax.Array,
    grid: Grid | None,
    options: _Options,
) -> tuple[_Pruned, jax.Array]:
    """Prunes a block of inputs.

    Returns:
      The block, and its errors divided by the diagonal of the factor.
    """
    diagonal = jnp.diagonal(factor)[:, None]
    masks = jnp.zeros_like(weights, dtype=bool)
    if options.group is None:
        (masks,) = keep_largest([weights / diagonal], kept)

    def masks_from(row: jax.Array, block: _Pruned) -> jax.Array:
        """The masks with those of the group that begins at a row."""
        n, m = options.group or (1, 1)
        own, divisor = (
            jax.lax.dynamic_slice_in_dim(array, row, m)
            for array in (block.weights, diagonal)
        )
        scores = Leaf("", own / divisor, Axes("input", "output"))
        ((_, mask),) = n_m(n, m).project_leaves([scores])
        return jax.lax.dynamic_update_slice_in_dim(block.masks, mask, row, axis=0)

    def prune_row(
        row: jax.Array, carry: tuple[_Pruned, jax.Array]
    ) -> tuple[_Pruned, jax.Array]:
        block, errors = carry
        if options.group is not None:
            begins = row % options.group[1] == 0
            masks = jax.lax.cond(
                begins, masks_from, lambda _, block: block.masks, row, block
            )
            block = block._replace(masks=masks)
        own = block.weights[row]
        left = own if grid is None else grid.rounded(own[None])[0]
        left = jnp.where(block.masks[row], left, 0)
        error = (own - left) / factor[row, row]
        later = jnp.where(jnp.arange(len(factor)) > row, factor[row], 0)
        moved = (block.weights - later[:, None] * error[None]).at[row].set(left)
        return block._replace(weights=moved), errors.at[row].set(error)

    start = _Pruned(weights, masks), jnp.zeros_like(weights)
    return jax.lax.fori_loop(0, len(weights), prune_row, start)


def _inverse_factor(hessian: jax.Array) -> jax.Array:
    """The upper triangular U with ``U.T @ U`` the inverse of a matrix.

    Taken from the last row and column, a Cholesky factor R is upper triangular, and
    ``inv(R @ R.T) = inv(R).T @ inv(R)``: only a triangle is inverted.
    """
    reversed_ = jnp.linalg.cholesky(hessian[::-1, ::-1])
    identity = jnp.eye(len(hessian), dtype=hessian.dtype)
    return jax.scipy.linalg.solve_triangular(reversed_[::-1, ::-1], identity)
