"""Projectors that set weights to zero."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.blocks import Block, by_block, check_block
from cram_jax.leaves import Where, project_prunable
from cram_jax.projector import (
    Family,
    Params,
    Projection,
    Projector,
    apply_masks,
    stateless,
)
from cram_jax.reshaping import join_axes, split_axis
from cram_jax.selection import keep_largest, magnitude_key

Number: TypeAlias = float | np.floating | np.ndarray | jax.Array
KeptCount: TypeAlias = Callable[[int], int | jax.Array]
"""From a number of weights to how many of them stay."""


def top_k(
    sparsity: Number,
    *,
    scope: Literal["global", "layer"] = "global",
    block: Block | None = None,
    where: Where | None = None,
) -> Projector:
    """Keeps the weights of largest magnitude, exactly as many as the sparsity says.

    Of ``size`` weights ``size - floor(sparsity * size)`` stay, counted over all
    prunable leaves together or in each leaf. Equal magnitudes: the weight that comes
    first stays.
    The paper uses the global scope for images, where layers then differ in sparsity,
    and one share for every layer in language models (appendix D).

    With ``block``, whole blocks stay or go, by their root mean square, and it is blocks
    that are counted. It is the shape of a block along the last axes, where None is a
    whole axis; the axes before are cut into single entries, or are whole after a
    leading ``...``. For Flax kernels of shape (..., inputs, outputs):

    - ``(1, 4)``: four neighbouring outputs of one input;
    - ``(..., 1)``: an output channel, of dense layers and convolutions alike;
    - ``(..., 64)``: an attention head of 64 units in a kernel (inputs, heads * 64);
    - ``(1, None, None)``: a head in the output kernel (heads, units, outputs) of
      ``MultiHeadAttention``; its query, key and value then no longer matter.

    A leaf that the block does not divide stays dense; `sparsity_report` lists it.

    The product is exact: 29 % of 100 is 29. The sparsity is read as the decimal that it
    prints as; a traced one, with which it can change from step to step without another
    compilation, is read to seven decimals (to 15 where it is float64).

    Args:
      sparsity: share of zeros, 0 <= sparsity < 1; a number or a scalar array.
      scope: "global" or "layer".
      block: shape of the blocks; by default single weights.
      where: which leaves, see `prunable`; by default those of two or more dimensions.

    Returns:
      A projector. Its masks are bool, shaped like the leaves.

    Raises:
      ValueError: the sparsity is out of range, the scope unknown, or the block of a
        wrong form; at ``init``, if ``where`` chooses no leaf or the block divides none.
      TypeError: the sparsity is not a number; at ``init``, if a leaf to prune is not of
        a floating dtype.

    Example:
      >>> params = {"a": jnp.array([[1.0, -4.0]]), "b": jnp.array([[2.0, 3.0]])}
      >>> compress(params, top_k(0.5)).params
      {'a': Array([[ 0., -4.]], dtype=float32), 'b': Array([[0., 3.]], dtype=float32)}
      >>> kernel = jnp.array([[1.0, 3.0, 0.0], [2.0, -1.0, 1.0]])
      >>> compress([kernel], top_k(2 / 3, block=(..., 1))).params
      [Array([[ 0.,  3.,  0.],
             [ 0., -1.,  0.]], dtype=float32)]

    Reference: Peste et al., CrAM, ICLR 2023, arXiv 2207.14200.
    """
    check_sparsity(sparsity)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    if block is not None:
        check_block(block)

    def project_keeping(params: Params, kept: KeptCount) -> Projection:
        def compress(leaves: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
            groups = [leaves] if scope == "global" else [[leaf] for leaf in leaves]
            masks = [
                mask
                for group in groups
                for mask in keep_largest(group, kept(sum(map(jnp.size, group))))
            ]
            return [
                (apply_masks(mask, x), mask)
                for x, mask in zip(leaves, masks, strict=True)
            ]

        chosen = compress if block is None else by_block(compress, block)
        return project_prunable(params, where, chosen)

    def project(params: Params, key: jax.Array | None) -> Projection:
        del key
        return project_keeping(params, partial(kept_count, sparsity=sparsity))

    def project_one_of(
        params: Params, sparsities: Sequence[Number], index: jax.Array
    ) -> Projection:
        def kept(size: int) -> jax.Array:
            return jnp.asarray([kept_count(size, s) for s in sparsities])[index]

        return project_keeping(params, kept)

    traced = isinstance(sparsity, jax.core.Tracer)
    amount = "traced" if traced else str(sparsity)
    options = {"scope": None if scope == "global" else scope, "block": block}
    suffix = "".join(f", {k}={v!r}" for k, v in options.items() if v is not None)
    label = f"top_k({amount}{suffix})".replace("Ellipsis", "...")
    # The closures keep ``where`` alive, so that no other has its id.
    name = ("top_k", scope, block, id(where))
    family = None if traced else Family(name, sparsity, project_one_of)
    return stateless(project, label)._replace(family=family)


def n_m(n: int, m: int, *, where: Where | None = None) -> Projector:
    """Keeps the n largest of every m consecutive weights, such as 2:4.

    Groups run along the input dimension, axis -2 of a Flax kernel of shape
    (..., inputs, outputs). Equal magnitudes: the earlier one is kept. A leaf whose
    input dimension m does not divide stays dense; `sparsity_report` lists it.

    Args:
      n: weights kept in each group, 1 <= n <= m.
      m: weights in a group.
      where: which leaves, see `prunable`; by default those of two or more dimensions.

    Returns:
      A projector. Its masks are bool, shaped like the leaves.

    Raises:
      ValueError: n or m out of range; at ``init``, if no leaf complies.
      TypeError: n or m is not an integer; at ``init``, if a leaf to prune is not of a
        floating dtype.

    Example:
      >>> kernel = jnp.array([[1.0], [4.0], [3.0], [2.0]])
      >>> compress({"kernel": kernel}, n_m(2, 4)).params["kernel"].ravel()
      Array([0., 4., 3., 0.], dtype=float32)

    Reference: Peste et al., CrAM, ICLR 2023, appendix C.5, arXiv 2207.14200.
    """
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if not 1 <= n <= m:
        raise ValueError(f"n must be between 1 and m={m}, got n={n}")

    def complies(leaf: jax.Array) -> bool:
        return jnp.ndim(leaf) >= 2 and jnp.shape(leaf)[-2] % m == 0

    def compress(leaves: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
        if not any(complies(leaf) for leaf in leaves):
            raise ValueError(
                f"m={m} divides the input dimension (axis -2) of no prunable leaf, got "
                f"shapes {[jnp.shape(leaf) for leaf in leaves]}"
            )
        masks = [
            _largest_of_groups(leaf, n, m)
            if complies(leaf)
            else jnp.ones_like(leaf, dtype=bool)
            for leaf in leaves
        ]
        return list(zip(apply_masks(masks, list(leaves)), masks, strict=True))

    def project(params: Params, key: jax.Array | None) -> Projection:
        del key
        return project_prunable(params, where, compress)

    return stateless(project, f"n_m({n}, {m})")


def _largest_of_groups(leaf: jax.Array, n: int, m: int) -> jax.Array:
    """True where fewer than n of the group come before the weight, by size then place.

    m * m comparisons in one fused pass: for groups this small a sort costs more.
    """
    keys = split_axis(magnitude_key(leaf), leaf.ndim - 2, m)
    own, other = keys[..., :, None, :], keys[..., None, :, :]
    earlier = jnp.tri(m, k=-1, dtype=bool)[:, :, None]
    ahead = jnp.sum((other > own) | ((other == own) & earlier), axis=-2)
    return join_axes(ahead < n, leaf)


def kept_count(size: int, sparsity: Number) -> int | jax.Array:
    """How many of ``size`` weights stay: ``size - floor(sparsity * size)``, exactly.

    Args:
      size: the number of weights.
      sparsity: as in `top_k`.

    Returns:
      An int, or an integer scalar where the sparsity is traced.

    Example:
      >>> kept_count(100, 0.29), kept_count(3, 1 - 1 / 3)
      (71, 1)
    """
    if not isinstance(sparsity, jax.core.Tracer):
        exact = Fraction(str(np.asarray(sparsity)[()])) * size
        nearest = round(exact)
        # A share computed as count / size is off by a rounding error of float64.
        rounding = Fraction(size, 2**52)
        is_integer = nearest < size and abs(exact - nearest) <= rounding
        return size - (nearest if is_integer else int(exact))
    if sparsity.dtype == jnp.float64:
        removed = jnp.floor(sparsity * size + size * 2.0**-52).astype(int)
    else:
        # float32 holds neither a large count nor 0.9, so multiply integers: first to
        # the nearest of ten million shares, then, digit by digit, to the count.
        binary = (sparsity.astype(jnp.float32) * 2**30).astype(jnp.int32)
        decimal = (_floor_product(binary, 2**10, 3, 2 * 10**7) + 1) // 2
        removed = _floor_product(decimal, 10, 7, size)
    return size - jnp.clip(removed, 0, size)


def _floor_product(
    numerator: jax.Array, base: int, digits: int, size: int
) -> jax.Array:
    """``floor(size * numerator / base**digits)`` without a product above ``size``."""
    total = jnp.zeros_like(numerator)
    for _ in range(digits):
        numerator, digit = numerator // base, numerator % base
        total = digit * (size // base) + (digit * (size % base) + total) // base
    return total + numerator * size


def check_sparsity(sparsity: Number) -> None:
    """Raises unless 0 <= sparsity < 1; a traced one is trusted."""
    if isinstance(sparsity, jax.core.Tracer):
        return
    if not isinstance(sparsity, float | int | np.number | np.ndarray | jax.Array):
        raise TypeError(
            f"sparsity must be a number with 0 <= sparsity < 1, got {sparsity!r}"
        )
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity!r}")
