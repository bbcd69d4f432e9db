"""Projectors that round weights to few levels."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.axes import Axes, AxesLike, axes_value
from cram_jax.leaves import Leaf, Where, where_value
from cram_jax.projector import safe_denominator
from cram_jax.quantization.blocks import blocked_axis, join_blocks, split_blocks
from cram_jax.quantization.floats import Scale, round_scale
from cram_jax.quantization.rounding import RoundingProjector
from cram_jax.scaling import power_of_two
from cram_jax.validation import check_choice, check_flag, check_integer

# Shares of the range that least squares tries: first these, then as many between the
# neighbours of the best one.
_SHARES = np.geomspace(0.1, 1.0, 16)
_REFINEMENTS = 3


def fake_quant(
    bits: int,
    *,
    symmetric: bool = True,
    per: Literal["channel", "tensor"] = "channel",
    block: int | None = None,
    scale: Scale = "float32",
    full_range: bool = False,
    clip: Literal["max", "least_squares"] = "max",
    where: Where | None = None,
    axes: AxesLike | None = None,
) -> "FakeQuant":
    """Rounds weights to the values that ``bits``-wide integers can hold, with a scale.

    A weight ``w`` becomes ``scale * (q - zero)`` with the integer
    ``q = round(w / scale) + zero``, clipped to the levels there are. Zero stays zero,
    so what was pruned stays pruned. Rounding is to nearest, half to even.

    - Symmetric: ``zero`` is 0 and ``q`` from ``-(2**(bits - 1) - 1)`` to
      ``2**(bits - 1) - 1``. Otherwise ``q`` is from 0 to ``2**bits - 1``, from the
      smallest to the largest weight (or 0), which suits skewed weights.
    - With ``full_range``, symmetric integers reach down to ``-2**(bits - 1)``, which
      the weight of the largest magnitude becomes; the scale has the opposite sign.
    - The range extends to the largest weight, or, with ``clip="least_squares"``, to
      where a search finds the least squared error of the rounded weights. That is more
      accurate at 4 bits and below, but takes about forty passes over the weights: use
      it in `compress`, not in every training step.

    The result stays in the leaf's dtype, and in its finite range. Gradients pass
    through as if nothing had been rounded. The masks are all True.

    Args:
      bits: width of the integers, 2 <= bits <= 16.
      symmetric: whether positive and negative weights get the same range.
      per: "channel", a scale for each output of a layer and each row of a lookup table;
        or "tensor", one for each layer. Leaves that are neither matrices nor tables
        have one scale. A layer is a leaf or a slice of stacked layers.
      block: how many neighbouring inputs of an output, or numbers in a row of a lookup
        table, share a scale; the last block may be shorter. Blocks run along the last
        input axis. None: as ``per`` says.
      scale: the dtype that scales are stored in: "float32" (of float64 leaves float64),
        "float16" or "bfloat16".
      full_range: whether symmetric integers use their lowest value too.
      clip: "max" or "least_squares".
      where: which leaves, see `prunable`.
      axes: what is known of the axes, see `axes_of`.

    Returns:
      A projector.

    Raises:
      ValueError: bits or block out of range, ``per``, ``scale`` or ``clip`` unknown, or
        options that exclude each other; at ``init``, if ``where`` chooses no leaf.
      TypeError: bits or block is not an integer, or ``symmetric`` or ``full_range`` not
        a bool; at ``init``, if a leaf to quantise is not of a floating dtype.

    Example:
      >>> params = [jnp.array([[0.1], [-0.7], [0.32]])]
      >>> compress(params, fake_quant(4)).params[0].ravel()
      Array([ 0.1, -0.7,  0.3], dtype=float32)
      >>> compress(params, fake_quant(2, symmetric=False)).params[0].ravel()
      Array([ 0.  , -0.68,  0.34], dtype=float32)

      What formats hold, bit for bit:

      >>> matmul_n_bits = fake_quant(4, block=32, scale="float16")
      >>> q4_0 = fake_quant(4, block=32, scale="float16", full_range=True)  # GGUF
      >>> q8_0 = fake_quant(8, block=32, scale="float16")
      >>> litert = fake_quant(4, block=32, scale="bfloat16")

    Reference: Peste et al., CrAM, ICLR 2023, table 16, arXiv 2207.14200.
    """
    check_integer("bits", bits, 2, 16)
    check_flag("symmetric", symmetric)
    check_choice("per", per, ("channel", "tensor"))
    check_choice("scale", scale, ("float32", "float16", "bfloat16"))
    check_flag("full_range", full_range)
    check_choice("clip", clip, ("max", "least_squares"))
    if block is not None:
        check_integer("block", block, 1)
        if per == "tensor":
            raise ValueError(f"per must be 'channel' with block={block}, got 'tensor'")
    if full_range and (not symmetric or clip != "max"):
        raise ValueError(
            f"full_range=True needs symmetric=True and clip='max', got "
            f"symmetric={symmetric} and clip={clip!r}"
        )
    return FakeQuant(
        int(bits),
        symmetric=bool(symmetric),
        per=per,
        block=None if block is None else int(block),
        scale=scale,
        full_range=bool(full_range),
        clip=clip,
        where=where_value(where),
        axes=axes_value(axes),
    )


@dataclass(frozen=True, repr=False)
class FakeQuant(RoundingProjector):
    """See `fake_quant`."""

    bits: int
    _: KW_ONLY
    symmetric: bool = True
    per: Literal["channel", "tensor"] = "channel"
    block: int | None = None
    scale: Scale = "float32"
    full_range: bool = False
    clip: Literal["max", "least_squares"] = "max"
    where: Any = None
    axes: Any = None

    def obstacle(self, leaf: Leaf) -> str:
        """Says so if there is nothing for blocks to run along."""
        without = self.block is not None and blocked_axis(leaf.axes) is None
        return "it has no inputs to cut into blocks" if without else ""

    def round_leaf(self, wide: jax.Array, axes: Axes) -> jax.Array:
        """To the levels of each channel, layer or block."""
        if self.block is None:
            own = own_scale(axes) if self.per == "channel" else axes.stack
            over = tuple(axis for axis in range(wide.ndim) if axis not in own)
            return self._rounded(wide, over)
        axis = blocked_axis(axes)
        assert axis is not None
        split = split_blocks(wide, axis, self.block)
        return join_blocks(self._rounded(split, (axis + 1,)), wide, axis)

    def _rounded(self, wide: jax.Array, over: "Over") -> jax.Array:
        """The nearest levels; weights along ``over`` share a grid."""
        symmetric, stored = self.symmetric, self.scale
        if self.full_range:
            grid = _fit_full_range(wide, self.bits, self.scale, over)
        elif self.clip == "max":
            grid = grid_between(
                *ends(wide, over), bits=self.bits, symmetric=symmetric, stored=stored
            )
        else:
            grid = _fit_least_squares(
                wide, over, bits=self.bits, symmetric=symmetric, stored=stored
            )
        return grid.rounded(wide)


def own_scale(axes: Axes) -> tuple[int, ...]:
    """The axes along which each entry has a scale of its own."""
    if not axes.is_matrix:
        return axes.stack
    return axes.stack + (axes.lookup or axes.outputs)


class Grid(NamedTuple):
    """The values ``scale * q`` for integers q from ``low`` to ``high``.

    Arrays that broadcast against the leaf. Integers are relative to the zero point:
    they start at ``-zero``, in the words of `fake_quant`.
    """

    scale: jax.Array
    low: jax.Array
    high: jax.Array

    def levels(self, leaf: jax.Array) -> jax.Array:
        """The integers of the nearest values."""
        return jnp.clip(jnp.round(leaf / self.scale), self.low, self.high)

    def rounded(self, leaf: jax.Array) -> jax.Array:
        """The nearest values."""
        return self.levels(leaf) * self.scale


class _Attempt(NamedTuple):
    error: jax.Array
    share: jax.Array
    grid: Grid


Over: TypeAlias = tuple[int, ...]
"""The axes along which weights share a grid."""


def grid_between(
    smallest: jax.Array,
    largest: jax.Array,
    *,
    bits: int,
    symmetric: bool = True,
    stored: Scale = "float32",
) -> Grid:
    """The grid from the smallest to the largest value, with zero on it."""
    if symmetric:
        highest = 2 ** (bits - 1) - 1
        scale = round_scale(jnp.maximum(-smallest, largest) / highest, stored)
        high = jnp.full_like(scale, highest)
        return Grid(safe_denominator(scale), -high, high)
    steps = 2**bits - 1
    # Separately, because their difference may be too large for the dtype.
    scale = round_scale(largest / steps - smallest / steps, stored)
    low = jnp.round(smallest / safe_denominator(scale))
    # A scale that was rounded down may need one step more than there is.
    low = jnp.clip(low, -steps, 0)
    return Grid(safe_denominator(scale), low, low + steps)


def ends(leaf: jax.Array, over: Over) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest weight, or 0."""
    smallest = jnp.min(leaf, over, keepdims=True, initial=0)
    return smallest, jnp.max(leaf, over, keepdims=True, initial=0)


def _fit_full_range(leaf: jax.Array, bits: int, stored: Scale, over: Over) -> Grid:
    """The grid whose lowest level is the weight of the largest magnitude."""
    smallest, largest = ends(leaf, over)
    lowest = 2 ** (bits - 1)
    scale = round_scale(jnp.maximum(-smallest, largest) / lowest, stored)
    scale = safe_denominator(jnp.where(largest > -smallest, -scale, scale))
    low = jnp.full_like(scale, -lowest)
    return Grid(scale, low, low + 2**bits - 1)


# Compiled once for each shape, also for those who call it outside of `jax.jit`.
@partial(jax.jit, static_argnames=("over", "bits", "symmetric", "stored"))
def _fit_least_squares(
    leaf: jax.Array, over: Over, *, bits: int, symmetric: bool, stored: Scale
) -> Grid:
    """Tries shares of the range, then alternates between levels and their best scale.

    The error has many local minima, so the search is a fine one. Neither half of an
    alternation can increase it, before the scale is rounded for storage.
    """
    make = partial(grid_between, bits=bits, symmetric=symmetric, stored=stored)
    smallest, largest = ends(leaf, over)
    unit = power_of_two(jnp.maximum(-smallest, largest))

    def error(grid: Grid) -> jax.Array:
        difference = (grid.rounded(leaf) - leaf) * (1 / unit)
        return jnp.sum(difference**2, over, keepdims=True)

    def search(shares: jax.Array, best: _Attempt) -> _Attempt:
        """Tries shares, along a new first axis before those of a grid."""

        def attempt(index: int, best: _Attempt) -> _Attempt:
            share = shares[index]
            grid = make(share * smallest, share * largest)
            challenger = _Attempt(error(grid), share, grid)
            wins = challenger.error < best.error
            return jax.tree.map(partial(jnp.where, wins), challenger, best)

        return jax.lax.fori_loop(0, len(shares), attempt, best)

    def refine(_: int, grid: Grid) -> Grid:
        levels = grid.levels(leaf)
        along = jnp.sum(levels * (leaf * (1 / unit)), over, keepdims=True)
        scale = along / safe_denominator(jnp.sum(levels**2, over, keepdims=True))
        scale = round_scale(scale * unit, stored)
        return grid._replace(scale=jnp.where(scale > 0, scale, grid.scale))

    ones = jnp.ones_like(largest)
    whole = make(smallest, largest)
    shares = jnp.asarray(_SHARES, leaf.dtype).reshape(-1, *[1] * leaf.ndim)
    coarse = search(shares * ones[None], _Attempt(error(whole), ones, whole))
    first, second = float(_SHARES[0]), float(_SHARES[-2])  # of no dtype
    between = (shares / first) ** (2 / (len(_SHARES) - 1)) * second
    fine = search(jnp.minimum(coarse.share[None] * between, 1), coarse)
    return jax.lax.fori_loop(0, _REFINEMENTS, refine, fine.grid)
