"""One integer for each weight; its leading bits are the smaller models."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from cram_jax.axes import Axes, AxesLike, axes_value
from cram_jax.leaves import Where, where_value
from cram_jax.projector import safe_denominator
from cram_jax.quantization.integers import own_scale
from cram_jax.quantization.rounding import RoundingProjector
from cram_jax.validation import check_integer


def nested(
    bits: int,
    *,
    of: int = 8,
    where: Where | None = None,
    axes: AxesLike | None = None,
) -> "Nested":
    """Rounds weights to the leading bits of their ``of``-bit integers.

    One training run and one file serve several widths: under `one_of`, such as
    ``one_of(nested(8), nested(4), nested(2))``, a model learns to work at each, and
    only the 8-bit integers are stored.

    With the largest magnitude M of an output (a row of a lookup table), a weight ``w``
    has the magnitude ``q = round(|w| (2**(of-1) - 1) / M)``, and its leading bits are
    ``r = q >> (of - bits)``. It becomes ``sign(w) r M / (2**(bits-1) - 1)``. So the
    levels are those of ``fake_quant(bits)``, but magnitudes are truncated to them
    instead of rounded. Truncating from 8 to 4 and then to 2 bits is the same as from 8
    to 2, and zero stays zero; ``nested(of, of=of)`` is ``fake_quant(of)``. The result
    stays in the leaf's dtype; gradients pass through as if nothing had been rounded;
    the masks are all True.

    Args:
      bits: width of the integers that are used, 2 <= bits <= of.
      of: width of the integers that are stored, at most 8.
      where: which leaves, see `prunable`.
      axes: what is known of the axes, see `axes_of`.

    Returns:
      A projector.

    Raises:
      ValueError: bits or ``of`` out of range.
      TypeError: they are not integers.

    Example:
      >>> kernel = jnp.array([[1.27], [-0.7], [0.62], [0.1]])
      >>> compress([kernel], nested(2)).params[0].ravel()
      Array([ 1.27, -1.27,  0.  ,  0.  ], dtype=float32)

    Reference: Nair et al., Matryoshka Quantization, 2025, arXiv 2502.06786; the cut
    towards zero is that of embedded coding, as in JPEG 2000.
    """
    check_integer("of", of, 2, 8)
    check_integer("bits", bits, 2, int(of))
    return Nested(
        int(bits), of=int(of), where=where_value(where), axes=axes_value(axes)
    )


@dataclass(frozen=True, repr=False)
class Nested(RoundingProjector):
    """See `nested`."""

    bits: int
    _: KW_ONLY
    of: int = 8
    where: Any = None
    axes: Any = None

    def round_leaf(self, wide: jax.Array, axes: Axes) -> jax.Array:
        """To the leading bits of the integers of each channel."""
        own = own_scale(axes)
        over = tuple(axis for axis in range(wide.ndim) if axis not in own)
        largest = jnp.max(jnp.abs(wide), over, keepdims=True, initial=0)
        fine = safe_denominator(largest / (2 ** (self.of - 1) - 1))
        coarse = largest / (2 ** (self.bits - 1) - 1)
        # Floats hold these integers exactly.
        cut = jnp.floor(jnp.round(jnp.abs(wide) / fine) / 2 ** (self.of - self.bits))
        return jnp.sign(wide) * cut * coarse
