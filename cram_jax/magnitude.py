"""Projectors that keep the largest weights."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.axes import AxesLike, axes_value
from cram_jax.blocks import (
    Block,
    block_scores,
    block_value,
    sides_of_block,
    spread_over_blocks,
)
from cram_jax.leaves import Leaf, LeafProjector, Where, where_value
from cram_jax.projector import apply_masks
from cram_jax.reshaping import join_axes, split_axis
from cram_jax.scaling import Scale, scale_of, scale_value, scaled
from cram_jax.selection import (
    keep_largest,
    keep_largest_of_layers,
    magnitude_key,
)
from cram_jax.sparsity import (
    Drawn,
    Number,
    Traced,
    check_sparsity,
    kept_count,
    sparsity_value,
)
from cram_jax.validation import check_choice, check_flag, check_integer


def top_k(
    sparsity: Number,
    *,
    scope: Literal["global", "layer"] = "global",
    block: Block | None = None,
    pad: bool = False,
    scale: Scale | None = None,
    where: Where | None = None,
    axes: AxesLike | None = None,
) -> "TopK":
    """Keeps the weights of largest magnitude, exactly as many as the sparsity says.

    Of ``size`` weights ``size - floor(sparsity * size)`` stay, counted over all
    prunable leaves together or in each layer, which is a leaf or a slice of stacked
    layers. Equal magnitudes: the weight that comes first stays.
    The paper uses the global scope for images, where layers then differ in sparsity,
    and one share for every layer in language models (appendix D).

    With ``block``, whole blocks stay or go, by their root mean square, and blocks are
    counted instead of weights. A block is (inputs, outputs), however the model lays out
    its kernels; None means all of them. In a convolution it covers one position of the
    window, or the whole window after a leading ``...``:

    - ``(4, 2)``: four neighbouring inputs of two outputs;
    - ``(..., 1)``: an output channel, of dense layers and convolutions alike;
    - ``(None, 64)``: a head of 64 units in the kernel of a query, key or value, be it
      (inputs, heads * 64) or (inputs, heads, 64);
    - ``(64, None)``: a head in the output kernel of an attention; its query, key and
      value then no longer matter.

    A leaf that the block does not divide stays dense, unless ``pad`` is True: then
    blocks at the edge are smaller. Lookup tables stay dense, too. `sparsity_report`
    lists such leaves.

    With ``scale``, magnitudes are multiplied by a number for each leaf before they are
    compared over all leaves. For weights that cost :math:`c` each, such as
    multiply-adds, :math:`c^{-1/2}` keeps the most of the sum of squares for what is
    spent: the ratio of :math:`w^2` to :math:`c` decides. A common factor changes
    nothing.

    The product is exact: 29 % of 100 is 29. The sparsity is read as the decimal that it
    prints as; a traced one, which can change from step to step without recompilation,
    is read to seven decimals (15 if it is float64).

    Args:
      sparsity: share of zeros, 0 <= sparsity < 1; a number or a scalar array.
      scope: "global" or "layer".
      block: shape of the blocks; by default single weights.
      pad: whether blocks may be incomplete.
      scale: ``(path, leaf) -> number``, or a tree of numbers like the parameters, or a
        dictionary of numbers by path, as `cram_jax.structure.multiply_adds` returns it.
        Every leaf to prune needs one. Only for the scope "global".
      where: which leaves, see `prunable`.
      axes: what is known of the axes, see `axes_of`.

    Returns:
      A projector. Its masks are bool, shaped like the leaves. With a traced sparsity it
      equals only itself.

    Raises:
      ValueError: the sparsity is out of range, the scope unknown, the block of a wrong
        form, or a scale not positive; at ``init``, if ``where`` chooses no leaf, the
        block divides none, or a leaf to prune has no scale.
      TypeError: the sparsity is not a number, or ``pad`` not a bool; at ``init``, if a
        leaf to prune is not of a floating dtype, or ``where`` or ``scale`` is a
        function that reads the weights.

    Example:
      >>> params = {"a": jnp.array([[1.0, -4.0]]), "b": jnp.array([[2.0, 3.0]])}
      >>> compress(params, top_k(0.5)).params
      {'a': Array([[ 0., -4.]], dtype=float32), 'b': Array([[0., 3.]], dtype=float32)}
      >>> kernel = jnp.array([[1.0, 3.0, 0.0], [2.0, -1.0, 1.0]])
      >>> compress([kernel], top_k(2 / 3, block=(..., 1))).params
      [Array([[ 0.,  3.,  0.],
             [ 0., -1.,  0.]], dtype=float32)]
      >>> compress(params, top_k(0.5, scale={"a": 1.0, "b": 4.0})).params
      {'a': Array([[0., 0.]], dtype=float32), 'b': Array([[2., 3.]], dtype=float32)}

    Reference: Peste et al., CrAM, ICLR 2023, arXiv 2207.14200.
    """
    check_sparsity(sparsity)
    check_choice("scope", scope, ("global", "layer"))
    check_flag("pad", pad)
    if scale is not None and scope != "global":
        raise ValueError(
            f"scale decides between leaves: scope must be 'global' with it, got "
            f"{scope!r}"
        )
    return TopK(
        sparsity_value(sparsity),
        scope=scope,
        block=None if block is None else block_value(block),
        pad=bool(pad),
        scale=scale_value(scale),
        where=where_value(where),
        axes=axes_value(axes),
    )


@dataclass(frozen=True, repr=False)
class TopK(LeafProjector):
    """See `top_k`."""

    sparsity: Any
    _: KW_ONLY
    scope: Literal["global", "layer"] = "global"
    block: Block | None = None
    pad: bool = False
    scale: Any = None
    where: Any = None
    axes: Any = None

    @property
    def shared(self) -> Hashable:
        """Itself with another sparsity."""
        return None if isinstance(self.sparsity, Traced) else replace(self, sparsity=0)

    def drawn(self, members: Sequence["TopK"], index: jax.Array) -> "TopK":
        """Itself with the sparsity of ``members[index]``."""
        return replace(self, sparsity=Drawn(tuple(m.sparsity for m in members), index))

    def obstacle(self, leaf: Leaf) -> str:
        """Says so if the block does not divide the leaf."""
        sides = self._sides(leaf)
        return sides if isinstance(sides, str) else ""

    def project_leaves(
        self, leaves: Sequence[Leaf]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Keeps the largest weights or blocks."""
        sides = [self._sides(leaf) for leaf in leaves]
        scores = [
            leaf.value if own is None else block_scores(leaf.value, own)
            for leaf, own in zip(leaves, sides, strict=True)
        ]
        if self.scale is not None:
            scores = [
                scaled(score, scale_of(self.scale, leaf.path, leaf.value))
                for score, leaf in zip(scores, leaves, strict=True)
            ]
        if self.scope == "global":
            kept = kept_count(sum(map(jnp.size, scores)), self.sparsity)
            masks = list(keep_largest(scores, kept))
        else:
            masks = [
                self._largest_of_layers(score, leaf.axes.stack)
                for score, leaf in zip(scores, leaves, strict=True)
            ]
        if self.block is not None:
            masks = [
                spread_over_blocks(mask, leaf.value, own)
                for mask, leaf, own in zip(masks, leaves, sides, strict=True)
            ]
        return [
            (apply_masks(mask, leaf.value), mask)
            for mask, leaf in zip(masks, leaves, strict=True)
        ]

    def _sides(self, leaf: Leaf) -> Any:
        if self.block is None:
            return None
        return sides_of_block(
            jnp.shape(leaf.value), leaf.axes, self.block, pad=self.pad
        )

    def _largest_of_layers(self, score: jax.Array, stack: tuple[int, ...]) -> jax.Array:
        size = score.size // max(math.prod(score.shape[a] for a in stack), 1)
        return keep_largest_of_layers(score, kept_count(size, self.sparsity), stack)


def n_m(
    n: int,
    m: int,
    *,
    stride: int = 1,
    where: Where | None = None,
    axes: AxesLike | None = None,
) -> "NM":
    """Keeps the n largest of every m consecutive weights, such as 2:4.

    Groups run along the inputs, in every output and every position of a window. If
    there are several input axes, they run along the last. Equal magnitudes: the earlier
    one stays. A leaf whose inputs m does not divide stays dense, and so do lookup
    tables; `sparsity_report` lists them.

    For an engine that groups differently, pass ``axes`` and ``stride``: "input" is the
    axis along which it groups, and with a stride s the members of a group lie s apart:
    i, i + s, ..., i + (m - 1) s.

    Args:
      n: weights kept in each group, 1 <= n <= m.
      m: weights in a group.
      stride: how far the members of a group lie apart, at least 1.
      where: which leaves, see `prunable`.
      axes: what is known of the axes, see `axes_of`.

    Returns:
      A projector. Its masks are bool, shaped like the leaves.

    Raises:
      ValueError: n, m or stride out of range; at ``init``, if no leaf complies.
      TypeError: n, m or stride is not an integer; at ``init``, if a leaf to prune is
        not of a floating dtype.

    Example:
      >>> kernel = jnp.array([[1.0], [4.0], [3.0], [2.0]])
      >>> compress({"kernel": kernel}, n_m(2, 4)).params["kernel"].ravel()
      Array([0., 4., 3., 0.], dtype=float32)

    Reference: Peste et al., CrAM, ICLR 2023, appendix C.5, arXiv 2207.14200.
    """
    check_integer("n", n)
    check_integer("m", m)
    check_integer("stride", stride, 1)
    if not 1 <= n <= m:
        raise ValueError(f"n must be between 1 and m={m}, got n={n}")
    return NM(
        int(n),
        int(m),
        stride=int(stride),
        where=where_value(where),
        axes=axes_value(axes),
    )


@dataclass(frozen=True, repr=False)
class NM(LeafProjector):
    """See `n_m`."""

    n: int
    m: int
    _: KW_ONLY
    stride: int = 1
    where: Any = None
    axes: Any = None

    def obstacle(self, leaf: Leaf) -> str:
        """Says so if the groups do not divide the inputs."""
        if not leaf.axes.inputs:
            return "it has no inputs"
        inputs = jnp.shape(leaf.value)[leaf.axes.inputs[-1]]
        span = self.m * self.stride
        return f"{span} does not divide its {inputs} inputs" if inputs % span else ""

    def project_leaves(
        self, leaves: Sequence[Leaf]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Keeps the largest weights of each group."""
        masks = [self._largest_of_groups(x.value, x.axes.inputs[-1]) for x in leaves]
        return [
            (apply_masks(mask, leaf.value), mask)
            for mask, leaf in zip(masks, leaves, strict=True)
        ]

    def _largest_of_groups(self, leaf: jax.Array, axis: int) -> jax.Array:
        """True where fewer than n of the group come before, by size, then position.

        m * m comparisons in one fused pass: for such small groups a sort costs more.
        """
        # Axes from ``axis`` on: groups, members and, with a stride, the gaps between.
        whole = split_axis(magnitude_key(leaf), axis, self.m * self.stride)
        keys = split_axis(whole, axis + 1, self.stride) if self.stride > 1 else whole
        own, other = jnp.expand_dims(keys, axis + 2), jnp.expand_dims(keys, axis + 1)
        earlier = np.tri(self.m, k=-1, dtype=bool)
        earlier = np.expand_dims(
            earlier, [i for i in range(own.ndim) if i not in (axis + 1, axis + 2)]
        )
        ahead = jnp.sum((other > own) | ((other == own) & earlier), axis=axis + 2)
        kept = ahead < self.n
        return join_axes(join_axes(kept, whole), leaf)
