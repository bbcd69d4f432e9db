"""Projectors that round weights to few levels."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.leaves import Where, project_prunable
from cram_jax.projector import (
    Params,
    Projection,
    Projector,
    safe_denominator,
    stateless,
)

# Shares of the range that least squares tries: first these, then as many between the
# neighbours of the best of them.
_SHARES = np.geomspace(0.1, 1.0, 16)
_REFINEMENTS = 3


def fake_quant(
    bits: int,
    *,
    symmetric: bool = True,
    per: Literal["channel", "tensor"] = "channel",
    clip: Literal["max", "least_squares"] = "max",
    where: Where | None = None,
) -> Projector:
    """Rounds weights to the values that ``bits``-wide integers can hold, with a scale.

    A weight ``w`` becomes ``scale * (q - zero)`` with the integer
    ``q = round(w / scale) + zero``, clipped to the levels there are. Zero stays zero,
    so what was pruned stays pruned. Rounding is to nearest, half to even.

    - Symmetric: ``zero`` is 0 and ``q`` from ``-(2**(bits - 1) - 1)`` to
      ``2**(bits - 1) - 1``. Otherwise ``q`` is from 0 to ``2**bits - 1``, from the
      smallest to the largest weight (or 0), which suits weights that lean to a side.
    - The range reaches to the largest weight, or, with ``clip="least_squares"``, to
      where a search finds the least squared error of the rounded weights: better at 4
      bits and below, and some forty passes over the weights, so rather for `compress`
      than for every step of a large model.

    The result stays in the leaf's dtype, and gradients pass through as if nothing had
    been rounded. The masks are all True.

    Args:
      bits: width of the integers, 2 <= bits <= 16.
      symmetric: whether positive and negative weights get the same range.
      per: "channel", a scale for each output channel (the last axis of a Flax kernel;
        a leaf of fewer than two dimensions has one), or "tensor", one for each leaf.
      clip: "max" or "least_squares".
      where: which leaves, see `prunable`; by default those of two or more dimensions.

    Returns:
      A projector.

    Raises:
      ValueError: bits out of range, ``per`` or ``clip`` unknown; at ``init``, if
        ``where`` chooses no leaf.
      TypeError: bits is not an integer, or ``symmetric`` not a bool; at ``init``, if a
        leaf to quantise is not of a floating dtype.

    Example:
      >>> params = [jnp.array([[0.1], [-0.7], [0.32]])]
      >>> compress(params, fake_quant(4)).params[0].ravel()
      Array([ 0.1, -0.7,  0.3], dtype=float32)
      >>> compress(params, fake_quant(2, symmetric=False)).params[0].ravel()
      Array([ 0.  , -0.68,  0.34], dtype=float32)

    Reference: Peste et al., CrAM, ICLR 2023, table 16, arXiv 2207.14200.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer):
        raise TypeError(f"bits must be an integer, got {bits!r}")
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be between 2 and 16, got {bits}")
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric must be True or False, got {symmetric!r}")
    if per not in ("channel", "tensor"):
        raise ValueError(f"per must be 'channel' or 'tensor', got {per!r}")
    if clip not in ("max", "least_squares"):
        raise ValueError(f"clip must be 'max' or 'least_squares', got {clip!r}")
    fit = _fit_range if clip == "max" else _fit_least_squares
    highest = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1

    def round_leaf(leaf: jax.Array) -> jax.Array:
        # bfloat16 cannot hold the ratio w / scale to the nearest of 255 levels.
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        axes = (
            tuple(range(leaf.ndim - 1)) if per == "channel" and leaf.ndim >= 2 else None
        )
        grid = fit(wide, highest, symmetric, axes)
        rounded = jax.lax.stop_gradient(_rounded(wide, grid).astype(leaf.dtype))
        return rounded + (leaf - jax.lax.stop_gradient(leaf))

    def compress(leaves: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
        return [(round_leaf(leaf), jnp.ones_like(leaf, bool)) for leaf in leaves]

    def project(params: Params, key: jax.Array | None) -> Projection:
        del key
        return project_prunable(params, where, compress)

    options = {"symmetric": symmetric, "per": per, "clip": clip}
    defaults = {"symmetric": True, "per": "channel", "clip": "max"}
    suffix = "".join(
        f", {name}={value!r}"
        for name, value in options.items()
        if value != defaults[name]
    )
    return stateless(project, f"fake_quant({bits}{suffix})")


class _Grid(NamedTuple):
    """The values ``scale * q`` for integers q from ``low`` to ``high``.

    Arrays that broadcast against the leaf. The integers are counted from the one that
    stands for zero: from ``-zero`` on, in the words of `fake_quant`.
    """

    scale: jax.Array
    low: jax.Array
    high: jax.Array


class _Attempt(NamedTuple):
    error: jax.Array
    share: jax.Array
    grid: _Grid


Axes = tuple[int, ...] | None


def _levels(leaf: jax.Array, grid: _Grid) -> jax.Array:
    return jnp.clip(jnp.round(leaf / grid.scale), grid.low, grid.high)


def _rounded(leaf: jax.Array, grid: _Grid) -> jax.Array:
    return _levels(leaf, grid) * grid.scale


def _grid(
    smallest: jax.Array, largest: jax.Array, highest: int, symmetric: bool
) -> _Grid:
    """The grid from the smallest to the largest value, with zero on it."""
    if symmetric:
        scale = jnp.maximum(-smallest, largest) / highest
        low = jnp.full_like(scale, -highest)
    else:
        scale = (largest - smallest) / highest
        low = jnp.round(smallest / safe_denominator(scale))
    return _Grid(
        safe_denominator(scale), low, low + (2 * highest if symmetric else highest)
    )


def _fit_range(leaf: jax.Array, highest: int, symmetric: bool, axes: Axes) -> _Grid:
    smallest = jnp.minimum(jnp.min(leaf, axes, keepdims=True), 0)
    largest = jnp.maximum(jnp.max(leaf, axes, keepdims=True), 0)
    return _grid(smallest, largest, highest, symmetric)


def _fit_least_squares(
    leaf: jax.Array, highest: int, symmetric: bool, axes: Axes
) -> _Grid:
    """Tries shares of the range, then alternates between levels and their best scale.

    The error has many small dips, so the search is a fine one. Neither half of an
    alternation can make it larger.
    """
    smallest = jnp.minimum(jnp.min(leaf, axes, keepdims=True), 0)
    largest = jnp.maximum(jnp.max(leaf, axes, keepdims=True), 0)

    def error(grid: _Grid) -> jax.Array:
        return jnp.sum((_rounded(leaf, grid) - leaf) ** 2, axes, keepdims=True)

    def search(shares: jax.Array, best: _Attempt) -> _Attempt:
        """Tries shares, a first axis of them before the axes of a grid."""

        def attempt(index: int, best: _Attempt) -> _Attempt:
            share = shares[index]
            grid = _grid(share * smallest, share * largest, highest, symmetric)
            challenger = _Attempt(error(grid), share, grid)
            wins = challenger.error < best.error
            return jax.tree.map(partial(jnp.where, wins), challenger, best)

        return jax.lax.fori_loop(0, len(shares), attempt, best)

    def refine(_: int, grid: _Grid) -> _Grid:
        levels = _levels(leaf, grid)
        along = jnp.sum(levels * leaf, axes, keepdims=True)
        scale = along / safe_denominator(jnp.sum(levels**2, axes, keepdims=True))
        return grid._replace(scale=jnp.where(scale > 0, scale, grid.scale))

    ones = jnp.ones_like(largest)
    whole = _grid(smallest, largest, highest, symmetric)
    shares = jnp.asarray(_SHARES, leaf.dtype).reshape(-1, *[1] * leaf.ndim)
    coarse = search(shares * ones, _Attempt(error(whole), ones, whole))
    between = (shares / _SHARES[0]) ** (2 / (len(_SHARES) - 1)) * _SHARES[-2]
    fine = search(jnp.minimum(coarse.share * between, 1), coarse)
    return jax.lax.fori_loop(0, _REFINEMENTS, refine, fine.grid)
